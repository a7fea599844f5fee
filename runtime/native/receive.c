// A bundle that comes from a host, in chunks: only those that are nowhere on the device are sent.
//
// When it is whole it is tried in a child process, renamed and only then activated, by one rename
// each, after everything before was synced: a kill or a power cut leaves the old version or the new
// one, and the next request removes or takes up what is left.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "clock.h"
#include "desk.h"
#include "fail.h"
#include "file.h"
#include "memory.h"
#include "sha256.h"
#include "wire.h"

enum { MAX_TRIES = 3, MAX_CHUNK = 1 << 20, MAX_CHUNKS = 1 << 20 };
static const double SLOWEST = 1e6;               // bytes a second that an old card writes
static const int64_t SPARE = 1 << 20;            // bytes of disk, for what is not the bundle
static const int64_t MAX_SIZE = (int64_t)4 << 30; // of a bundle

struct chunk {
    char sha256[65];
    int64_t offset, size;
};

struct chunks { // outlives a request
    size_t count, room;
    struct chunk *items;
};

static char part[4096]; // of the bundle that is coming, "" without
static int64_t part_size;
static bool part_empty; // it was not begun before
static struct chunks got;

static void add_chunk(struct chunks *chunks, const char *sha256, int64_t offset, int64_t size) {
    for (size_t i = 0; i < chunks->count; i++)
        if (chunks->items[i].offset == offset) {
            chunks->items[i].size = size;
            memcpy(chunks->items[i].sha256, sha256, 65);
            return;
        }
    if (chunks->count == chunks->room) {
        size_t room = chunks->room ? chunks->room * 2 : 256;
        struct chunk *larger =
            room > MAX_CHUNKS ? NULL : realloc(chunks->items, room * sizeof *larger);
        if (!larger)
            fail(TARGET, "too many chunks");
        chunks->items = larger;
        chunks->room = room;
    }
    struct chunk *one = &chunks->items[chunks->count++];
    one->offset = offset;
    one->size = size;
    memcpy(one->sha256, sha256, 65);
}

static int by_offset(const void *a, const void *b) {
    int64_t x = ((const struct chunk *)a)->offset, y = ((const struct chunk *)b)->offset;
    return (x > y) - (x < y);
}

void check_tries(const char *sha256) {
    const struct json *tries = json_get(place_tries(desk.place), sha256);
    double count = tries ? json_number_or(tries, "count", 0) : 0;
    if (count >= MAX_TRIES)
        fail(TARGET, "this bundle failed its trial here %.0f times (last: %s); deploy another, or "
             "forget its trials with edgekit gc", count, json_text_or(tries, "why", "unknown"));
}

void check_sequence(const char *file, bool allow_older) {
    struct state state = place_state(desk.place);
    if (!state.active || allow_older || compare_sequences(file, state.active) >= 0)
        return;
    fail(UNUSABLE, "it has sequence %.*s, %.*s is active; go back with edgekit rollback, or deploy "
         "it with --allow-older", (int)strcspn(file, "-"), file, (int)strcspn(state.active, "-"),
         state.active);
}

static void check_room(void) {
    struct stat facts;
    struct statvfs disk;
    int64_t there = part_empty || stat(part, &facts) ? 0 : (int64_t)facts.st_blocks * 512;
    if (statvfs(desk.place->folder, &disk))
        fail(TARGET, "%s: %s", desk.place->folder, system_error());
    int64_t room = (int64_t)disk.f_bavail * (int64_t)disk.f_frsize, wanted = part_size - there + SPARE;
    if (wanted > room)
        fail(TARGET, "no room for it beside the version that is active: it needs %.1f MB, %.1f MB are "
             "free; edgekit gc removes older versions", (double)wanted / 1e6, (double)room / 1e6);
}

static void make_part(void) {
    int handle = open(part, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (handle < 0)
        fail(TARGET, "%s: %s", part, system_error());
    int why = 0;
    if (lseek(handle, 0, SEEK_END) != part_size)
        why = ftruncate(handle, part_size) ? errno : posix_fallocate(handle, 0, part_size);
    close(handle);
    if (why == ENOSPC || why == EDQUOT)
        fail(TARGET, "the disk there is full; edgekit gc removes older versions");
    if (why && why != EOPNOTSUPP && why != EINVAL)
        fail(TARGET, "%s: %s", part, strerror(why));
}

void do_begin(const struct json *request, struct text *answer) {
    const char *file = json_text(request, "file"), *sha256 = json_text(request, "sha256");
    int64_t size = json_integer(request, "size");
    if (!is_version(file) || !is_hash(sha256) || size <= 0 || size > MAX_SIZE)
        fail(UNUSABLE, "'%.80s' is no name of a version", file);
    check_tries(sha256);
    check_sequence(file, json_truth(request, "allow_older"));
    desk_change();
    place_clear(desk.place, sha256);
    answer_ok(answer);
    if (place_holds(desk.place, file, sha256, desk_listen)) {
        place_clear(desk.place, NULL);
        const char *active = place_state(desk.place).active;
        bool same = active && !strcmp(active, file);
        text_json_member(answer, "state", same ? "active" : "installed");
        return;
    }
    if ((size_t)snprintf(part, sizeof part, "%s/%s.part", desk.place->incoming, sha256) >= sizeof part)
        fail(UNUSABLE, "the folder's name is too long");
    part_size = size;
    got.count = 0;
    part_empty = !exists(part);
    check_room();
    make_part();
    place_note(desk.place, "receiving", file, sha256);
    text_json_member(answer, "state", "wanted");
    text_json_member_truth(answer, "fresh", part_empty && !place_installed(desk.place).count);
}

static const struct json *chunks_of(const struct json *request) {
    const struct json *chunks = json_get(request, "chunks");
    if (!chunks || chunks->kind != J_LIST)
        fail(UNUSABLE, "a request without chunks");
    for (size_t i = 0; i < chunks->length; i++) {
        const struct json *one = &chunks->items[i];
        bool fits = one->kind == J_LIST && one->length == 3 && one->items[0].kind == J_TEXT &&
                    is_hash(one->items[0].text) && one->items[1].kind == J_INT && one->items[2].kind == J_INT;
        if (!fits)
            fail(UNUSABLE, "a chunk is no [sha256, offset, size]");
    }
    return chunks;
}

static bool fits_part(int64_t offset, int64_t size) {
    return *part && size > 0 && size <= MAX_CHUNK && offset >= 0 && offset <= part_size - size;
}

// What versions under the root hold, by what was noted when they came.
struct known {
    size_t count, room;
    struct source {
        const char *sha256, *path;
        int64_t offset, size;
    } *items;
};

static void add_known(struct known *known, const struct json *chunks, const char *path) {
    size_t wanted = known->count + chunks->length;
    if (wanted > known->room) {
        known->room = 2 * wanted;
        struct source *larger = take_array(known->room, sizeof *larger);
        if (known->count)
            memcpy(larger, known->items, known->count * sizeof *larger);
        known->items = larger;
    }
    for (size_t i = 0; i < chunks->length; i++) {
        const struct json *one = &chunks->items[i];
        if (one->kind != J_LIST || one->length != 3 || one->items[0].kind != J_TEXT ||
            one->items[1].kind != J_INT || one->items[2].kind != J_INT)
            continue;
        known->items[known->count++] = (struct source){one->items[0].text, path,
                                                       one->items[1].integer, one->items[2].integer};
    }
}

static struct known known_chunks(void) {
    struct known known = {0};
    struct names all = folder_names(desk.place->root);
    for (size_t n = 0; n < all.count; n++) {
        if (!is_name(all.items[n]))
            continue;
        char *folder = take_format("%s/%s/index", desk.place->root, all.items[n]);
        struct names index = folder_names(folder);
        for (size_t i = 0; i < index.count; i++) {
            size_t length = strlen(index.items[i]);
            const struct json *chunks =
                json_get(json_file(take_format("%s/%s", folder, index.items[i])), "chunks");
            if (length > 5 && chunks && chunks->kind == J_LIST)
                add_known(&known, chunks,
                          take_format("%s/%s/versions/%.*s", desk.place->root, all.items[n],
                                      (int)length - 5, index.items[i])); // without ".json"
        }
    }
    return known;
}

static const struct source *find_known(const struct known *known, const char *sha256, int64_t size) {
    for (size_t i = 0; i < known->count; i++)
        if (known->items[i].size == size && !strcmp(known->items[i].sha256, sha256))
            return &known->items[i];
    return NULL;
}

// Whether the chunk was had of a version that is here; what is noted of that is not believed.
static bool copy_chunk(int handle, const struct known *known, const char *sha256, int64_t offset,
                       int64_t size) {
    const struct source *from = find_known(known, sha256, size);
    int source = from && from->offset >= 0 ? open(from->path, O_RDONLY | O_CLOEXEC) : -1;
    if (source < 0)
        return false;
    char *bytes = take((size_t)size), found[65];
    bool whole = pread(source, bytes, (size_t)size, (off_t)from->offset) == size;
    close(source);
    struct sha256 hash;
    sha256_begin(&hash);
    sha256_add(&hash, bytes, (size_t)size);
    sha256_end(&hash, found);
    if (!whole || strcmp(found, sha256) || lseek(handle, offset, SEEK_SET) != offset)
        return false;
    write_all(handle, bytes, (size_t)size);
    return true;
}

void do_have(const struct json *request, struct text *answer) {
    const struct json *chunks = chunks_of(request);
    int handle = *part ? open(part, O_WRONLY | O_CLOEXEC) : -1;
    if (handle < 0)
        fail(UNUSABLE, "it was not begun");
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        close(handle);
        fail_again(&trap.fault);
    }
    answer_ok(answer);
    text_json_key(answer, "missing");
    text_add(answer, "[", 1);
    struct known known = known_chunks();
    for (size_t i = 0; i < chunks->length; i++) {
        const struct json *one = chunks->items[i].items;
        const char *sha256 = one[0].text;
        int64_t offset = one[1].integer, size = one[2].integer;
        desk_listen();
        bool here = fits_part(offset, size) &&
                    ((!part_empty && !strcmp(hash_of(part, offset, size, NULL), sha256)) ||
                     copy_chunk(handle, &known, sha256, offset, size));
        if (here) {
            add_chunk(&got, sha256, offset, size);
        } else {
            text_json_key(answer, NULL);
            text_format(answer, "%zu", i);
        }
    }
    text_add(answer, "]", 1);
    trap_close(&trap);
    close(handle);
}

static void write_chunk(int handle, const char *bytes, const struct json *one) {
    char found[65];
    struct sha256 hash;
    const char *sha256 = one[0].text;
    int64_t offset = one[1].integer, size = one[2].integer;
    if (handle < 0 || !fits_part(offset, size))
        fail(UNUSABLE, "a chunk is larger than the bundle it is of");
    sha256_begin(&hash);
    sha256_add(&hash, bytes, (size_t)size);
    sha256_end(&hash, found);
    if (strcmp(found, sha256))
        fail(TARGET, "a chunk was damaged on the way; deploy it again");
    if (lseek(handle, offset, SEEK_SET) != offset)
        fail(TARGET, "%s: %s", part, system_error());
    write_all(handle, bytes, (size_t)size);
    add_chunk(&got, sha256, offset, size);
}

// Whether it was written; if not, why is in `fault`.
static bool try_write(int handle, const char *bytes, const struct json *one, struct fault *fault) {
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        *fault = trap.fault;
        return false;
    }
    write_chunk(handle, bytes, one);
    trap_close(&trap);
    return true;
}

void do_take(const struct json *request, struct text *answer) {
    const struct json *chunks = chunks_of(request);
    struct fault fault = {0};
    char *bytes = take(MAX_CHUNK);
    for (size_t i = 0; i < chunks->length; i++)
        if (chunks->items[i].items[2].integer <= 0 || chunks->items[i].items[2].integer > MAX_CHUNK)
            fail(UNUSABLE, "a chunk has an unusable size");
    int handle = *part ? open(part, O_WRONLY | O_CLOEXEC) : -1;
    for (size_t i = 0; i < chunks->length; i++) {
        const struct json *one = chunks->items[i].items;
        wire_bytes(bytes, (size_t)one[2].integer); // also after a failure: they are no requests
        if (!fault.code)
            try_write(handle, bytes, one, &fault);
    }
    if (handle >= 0)
        close(handle);
    if (fault.code)
        fail_again(&fault);
    answer_ok(answer);
}

// Every byte was hashed, by this process.
static void check_whole(void) {
    int64_t at = 0;
    qsort(got.items, got.count, sizeof *got.items, by_offset);
    for (size_t i = 0; i < got.count && got.items[i].offset == at; i++)
        at += got.items[i].size;
    if (at != part_size)
        fail(TARGET, "the bundle did not arrive whole; deploy it again");
}

static void sync_part(void) {
    int handle = open(part, O_RDONLY | O_CLOEXEC);
    bool done = handle >= 0 && !fsync(handle);
    if (handle >= 0)
        close(handle);
    if (!done)
        fail(TARGET, "%s: %s", part, system_error());
}

static void store_index(const char *file, const char *sha256) {
    struct text text = {0};
    text_add(&text, "{", 1);
    text_json_member(&text, "sha256", sha256);
    text_json_key(&text, "chunks");
    text_add(&text, "[", 1);
    for (size_t i = 0; i < got.count; i++) {
        const struct chunk *one = &got.items[i];
        text_format(&text, "%s[\"%s\", %lld, %lld]", i ? ", " : "", one->sha256,
                    (long long)one->offset, (long long)one->size);
    }
    text_add(&text, "]}", 2);
    file_replace(take_format("%s/%s.json", desk.place->index, file), text.bytes, text.length, true);
}

struct verdict {
    const struct json *said; // what it printed, NULL without
    const char *text;        // the same, as it is
    const char *why;         // it failed
    int code;                // 3: for want of an engine
};

static const char *after_prefix(const char *words) {
    const char *colon = strstr(words, ": ");
    return *words ? (colon ? colon + 2 : words) : "it said nothing";
}

static const struct json *parsed(const char *line) {
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here))
        return NULL;
    const struct json *found = json_parse(line, strlen(line));
    trap_close(&trap);
    return found->kind == J_OBJECT ? found : NULL;
}

static struct verdict judge(int code, char *said, const char *words) {
    size_t length = strlen(said);
    while (length && strchr(" \t\r\n", said[length - 1]))
        said[--length] = 0;
    char *last = strrchr(said, '\n');
    struct verdict verdict = {.text = last ? last + 1 : said, .code = code};
    verdict.said = parsed(verdict.text);
    if (code < 0)
        verdict.why = take_format("the engine crashed with signal %d (%s)", -code, after_prefix(words));
    else if (!verdict.said)
        verdict.why = after_prefix(words);
    else if (!json_truth(verdict.said, "ok")) {
        verdict.why = json_text_or(verdict.said, "why", "it does not say why");
        verdict.code = (int)json_number_or(verdict.said, "code", 0);
    }
    return verdict;
}

static struct verdict try_it(const struct json *command, const char *bundle, const char *active,
                             double limit_s) {
    struct json whole = {.kind = J_LIST, .items = take_array(command->length + 2, sizeof whole)};
    for (size_t i = 0; i < command->length; i++) {
        whole.items[whole.length] = command->items[i];
        if (command->items[i].kind == J_TEXT && !strcmp(command->items[i].text, "{bundle}"))
            whole.items[whole.length].text = take_text(bundle, strlen(bundle));
        whole.length++;
    }
    if (active) {
        whole.items[whole.length++] = (struct json){.kind = J_TEXT, .text = "--active"};
        whole.items[whole.length++] = (struct json){
            .kind = J_TEXT, .text = take_format("%s/%s", desk.place->versions, active)};
    }
    struct child *child = errand_start("trial", &whole, NULL, NULL); // ends with this process
    char *said = child_rest(child, clock_ns() + (int64_t)(limit_s * 1e9));
    int code = 0;
    bool ended = said && child_code(child, &code);
    char *words = child_last_words(child);
    errand_end("trial");
    if (!ended)
        return (struct verdict){.why = take_format("it did not end within %.0f s", limit_s)};
    return judge(code, said, words);
}

static _Noreturn void failed(const char *sha256, const struct verdict *verdict) {
    bool bundles = verdict->code != NO_TOOL; // its fault, not that of what is installed here
    const struct json *tries = json_get(place_tries(desk.place), sha256);
    int64_t count = (tries ? (int64_t)json_number_or(tries, "count", 0) : 0) + 1;
    if (bundles)
        place_write_tries(desk.place, sha256, count, verdict->why);
    if (*part)
        remove_file(part);
    *part = 0;
    place_done(desk.place);
    if (!bundles)
        fail(TARGET, "it cannot be tried: %s; nothing changed", verdict->why);
    fail(TARGET, "it failed its trial (%lld of %d): %s; nothing changed", (long long)count, MAX_TRIES,
         verdict->why);
}

void do_commit(const struct json *request, struct text *answer) {
    const char *file = json_text(request, "file"), *sha256 = json_text(request, "sha256");
    const struct json *trial = json_get(request, "trial");
    double limit_s = json_number_or(request, "limit_s", json_number_or(request, "timeout_s", 300));
    if (!is_version(file) || !is_hash(sha256) || !trial || trial->kind != J_LIST || desk.place->lock < 0)
        fail(UNUSABLE, "it was not begun");
    if (*part && !strstr(part, sha256))
        fail(UNUSABLE, "another bundle was begun");
    const char *active = place_state(desk.place).active;
    if (*part) {
        check_whole();
        place_heard(desk.place, (double)part_size / SLOWEST);
        sync_part();
    }
    place_note(desk.place, "trial", file, sha256);
    struct verdict verdict =
        try_it(trial, *part ? part : take_format("%s/%s", desk.place->versions, file), active, limit_s);
    if (verdict.why)
        failed(sha256, &verdict);
    if (*part) {
        place_note(desk.place, "keeping", file, sha256);
        place_keep(desk.place, part, file);
        *part = 0;
        store_index(file, sha256);
    }
    place_note(desk.place, "switching", file, sha256);
    place_activate(desk.place, file);
    place_write_tries(desk.place, sha256, 0, "");
    place_done(desk.place);
    answer_ok(answer);
    text_json_member(answer, "active", file);
    text_json_member(answer, "previous", place_state(desk.place).previous);
    text_json_key(answer, "trial");
    text_add(answer, verdict.text, strlen(verdict.text));
}

void do_keep(const struct json *request, struct text *answer) {
    const char *file = json_text(request, "file"), *sha256 = json_text(request, "sha256");
    if (!*part || !is_version(file) || !is_hash(sha256) || !strstr(part, sha256))
        fail(UNUSABLE, "it was not begun");
    check_whole();
    sync_part();
    place_keep(desk.place, part, file);
    store_index(file, sha256);
    place_done(desk.place);
    *part = 0;
    answer_ok(answer);
}
