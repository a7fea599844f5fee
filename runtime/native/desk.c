// Installs bundles and measures for a host, which speaks in lines of JSON: the requests and their
// answers are those of `edgekit_runtime.installer` and `edgekit_runtime.workbench`.
//
// A bundle that is whole is tried in a child process, renamed and only then activated, by one
// rename each, after everything before was synced: a kill or a power cut leaves the old version or
// the new one, and the next command removes or takes up what is left.
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utime.h>

#include "child.h"
#include "clock.h"
#include "fail.h"
#include "file.h"
#include "machine.h"
#include "memory.h"
#include "place.h"
#include "sha256.h"
#include "verbs.h"
#include "wire.h"

enum {
    MAX_TRIES = 3, MAX_CHUNK = 1 << 20, MOST_READ = 1 << 16, MOST_CHILDREN = 64, MAX_CHUNKS = 1 << 20,
};
static const double SLOWEST = 1e6;           // bytes a second that an old card writes
static const int64_t SPARE = 1 << 20;        // bytes of disk, for what is not the bundle
static const int64_t KEPT_BYTES = 256 << 20; // of files that were measured, for the next time

struct chunk {
    char sha256[65];
    int64_t offset, size;
};

struct chunks { // outlives a request
    size_t count, room;
    struct chunk *items;
};

static struct place *place;
static const char *owner;
static char scratch[4096];
static char part[4096]; // of the bundle that is coming, "" without
static int64_t part_size;
static bool part_empty; // it was not begun before
static struct chunks got;
static struct {
    char id[64];
    struct child *child;
} children[MOST_CHILDREN];

static void ok(struct text *answer) { text_format(answer, "{\"ok\": true"); }

static void add_chunk(struct chunks *chunks, const char *sha256, int64_t offset, int64_t size) {
    for (size_t i = 0; i < chunks->count; i++)
        if (chunks->items[i].offset == offset) {
            chunks->items[i].size = size;
            memcpy(chunks->items[i].sha256, sha256, 65);
            return;
        }
    if (chunks->count == chunks->room) {
        chunks->room = chunks->room ? chunks->room * 2 : 256;
        struct chunk *larger = chunks->count > MAX_CHUNKS
                                   ? NULL : realloc(chunks->items, chunks->room * sizeof *larger);
        if (!larger)
            fail(TARGET, "too many chunks");
        chunks->items = larger;
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

static void change(void) {
    place_make(place);
    place_lock(place, owner, true);
    wire_be_strict();
}

static void listen(void) { wire_wait(-1, 0); }

// --- what is installed --------------------------------------------------------------------------

static void names_to_json(struct text *answer, const char *key, struct names names) {
    text_json_key(answer, key);
    text_add(answer, "[", 1);
    for (size_t i = 0; i < names.count; i++) {
        text_json_key(answer, NULL);
        text_json_string(answer, names.items[i]);
    }
    text_add(answer, "]", 1);
}

static void status_to_json(struct text *answer) {
    struct state state = place_state(place);
    struct json *journal = json_file(place->journal), *tries = place_tries(place);
    text_json_member(answer, "name", place->name);
    text_json_member(answer, "active", state.active);
    text_json_member(answer, "previous", state.previous);
    names_to_json(answer, "versions", place_installed(place));
    text_json_key(answer, "unfinished");
    if (journal->length) {
        text_add(answer, "{", 1);
        for (size_t i = 0; i < journal->length; i++)
            if (journal->items[i].kind == J_TEXT)
                text_json_member(answer, journal->keys[i].text, journal->items[i].text);
        text_add(answer, "}", 1);
    } else
        text_add(answer, "null", 4);
    text_json_key(answer, "failed_trials");
    text_add(answer, "{", 1);
    for (size_t i = 0; i < tries->length; i++) {
        text_json_key(answer, tries->keys[i].text);
        text_add(answer, "{", 1);
        text_json_member_integer(answer, "count", (int64_t)json_number_or(&tries->items[i], "count", 0));
        text_json_member(answer, "why", json_text_or(&tries->items[i], "why", ""));
        text_add(answer, "}", 1);
    }
    text_add(answer, "}", 1);
}

static void do_hello(const struct json *request, struct text *answer) {
    const char *runtime = json_text(request, "runtime");
    ok(answer);
    text_json_member(answer, "root", place->root);
    text_json_member(answer, "machine", machine_name());
    text_json_member(answer, "model", NULL);
    text_json_member(answer, "python", NULL);
    text_json_member_truth(answer, "runtime", exists(take_format("%s/.device/%s", place->root, runtime)));
}

static void do_status(const struct json *request, struct text *answer) {
    (void)request;
    ok(answer);
    status_to_json(answer);
}

// --- a bundle that comes ------------------------------------------------------------------------

static void check_tries(const char *sha256) {
    const struct json *tries = json_get(place_tries(place), sha256);
    double count = tries ? json_number_or(tries, "count", 0) : 0;
    if (count >= MAX_TRIES)
        fail(TARGET, "this bundle failed its trial here %.0f times (last: %s); deploy another, or "
             "forget its trials with edgekit gc", count, json_text_or(tries, "why", "unknown"));
}

static void check_sequence(const char *file, bool allow_older) {
    struct state state = place_state(place);
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
    if (statvfs(place->folder, &disk))
        fail(TARGET, "%s: %s", place->folder, system_error());
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

static bool is_there(const char *file, const char *sha256) {
    return !strcmp(hash_of(take_format("%s/%s", place->versions, file), 0, -1, listen), sha256);
}

static void do_begin(const struct json *request, struct text *answer) {
    const char *file = json_text(request, "file"), *sha256 = json_text(request, "sha256");
    int64_t size = json_integer(request, "size");
    if (!is_version(file) || !is_hash(sha256) || size <= 0)
        fail(UNUSABLE, "'%.80s' is no name of a version", file);
    check_tries(sha256);
    check_sequence(file, json_truth(request, "allow_older"));
    change();
    place_clear(place, sha256);
    ok(answer);
    if (is_there(file, sha256)) {
        place_clear(place, NULL);
        const char *active = place_state(place).active;
        bool same = active && !strcmp(active, file);
        text_json_member(answer, "state", same ? "active" : "installed");
        return;
    }
    if ((size_t)snprintf(part, sizeof part, "%s/%s.part", place->incoming, sha256) >= sizeof part)
        fail(UNUSABLE, "the folder's name is too long");
    part_size = size;
    got.count = 0;
    part_empty = !exists(part);
    check_room();
    make_part();
    place_note(place, "receiving", file, sha256);
    text_json_member(answer, "state", "wanted");
    text_json_member_truth(answer, "fresh", part_empty && !place_installed(place).count);
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

// Where a chunk is to be had, of any version under the root: path and offset.
static char *known_chunk(const char *sha256, int64_t size, int64_t *offset) {
    struct names all = folder_names(place->root);
    for (size_t n = 0; n < all.count; n++) {
        if (!is_name(all.items[n]))
            continue;
        char *folder = take_format("%s/%s/index", place->root, all.items[n]);
        struct names index = folder_names(folder);
        for (size_t i = 0; i < index.count; i++) {
            const struct json *chunks =
                json_get(json_file(take_format("%s/%s", folder, index.items[i])), "chunks");
            for (size_t c = 0; chunks && chunks->kind == J_LIST && c < chunks->length; c++) {
                const struct json *one = &chunks->items[c];
                if (one->kind != J_LIST || one->length != 3 || one->items[0].kind != J_TEXT ||
                    strcmp(one->items[0].text, sha256) || one->items[2].integer != size)
                    continue;
                *offset = one->items[1].integer;
                return take_format("%s/%s/versions/%.*s", place->root, all.items[n],
                                   (int)strlen(index.items[i]) - 5, index.items[i]);
            }
        }
    }
    return NULL;
}

static bool copy_chunk(int handle, const char *sha256, int64_t offset, int64_t size) {
    int64_t from;
    char *path = known_chunk(sha256, size, &from);
    if (!path || from < 0 || strcmp(hash_of(path, from, size, NULL), sha256))
        return false;
    char *bytes = take((size_t)size);
    int source = open(path, O_RDONLY | O_CLOEXEC);
    bool whole = source >= 0 && pread(source, bytes, (size_t)size, from) == size;
    if (source >= 0)
        close(source);
    if (whole && lseek(handle, offset, SEEK_SET) == offset)
        write_all(handle, bytes, (size_t)size);
    return whole;
}

static void do_have(const struct json *request, struct text *answer) {
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
    ok(answer);
    text_json_key(answer, "missing");
    text_add(answer, "[", 1);
    for (size_t i = 0; i < chunks->length; i++) {
        const struct json *one = chunks->items[i].items;
        const char *sha256 = one[0].text;
        int64_t offset = one[1].integer, size = one[2].integer;
        listen();
        bool here = fits_part(offset, size) &&
                    ((!part_empty && !strcmp(hash_of(part, offset, size, NULL), sha256)) ||
                     copy_chunk(handle, sha256, offset, size));
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

static void do_take(const struct json *request, struct text *answer) {
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
    ok(answer);
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
    file_replace(take_format("%s/%s.json", place->index, file), text.bytes, text.length, true);
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
            .kind = J_TEXT, .text = take_format("%s/%s", place->versions, active)};
    }
    struct child *child = child_start(&whole, NULL, NULL);
    char *said = child_rest(child, clock_ns() + (int64_t)(limit_s * 1e9));
    int code = 0;
    bool ended = said && child_code(child, &code);
    char *words = child_last_words(child);
    child_end(child);
    if (!ended)
        return (struct verdict){.why = take_format("it did not end within %.0f s", limit_s)};
    return judge(code, said, words);
}

static _Noreturn void failed(const char *sha256, const struct verdict *verdict) {
    bool bundles = verdict->code != NO_TOOL; // its fault, not that of what is installed here
    const struct json *tries = json_get(place_tries(place), sha256);
    int64_t count = (tries ? (int64_t)json_number_or(tries, "count", 0) : 0) + 1;
    if (bundles)
        place_write_tries(place, sha256, count, verdict->why);
    if (*part)
        remove_file(part);
    *part = 0;
    place_done(place);
    if (!bundles)
        fail(TARGET, "it cannot be tried: %s; nothing changed", verdict->why);
    fail(TARGET, "it failed its trial (%lld of %d): %s; nothing changed", (long long)count, MAX_TRIES,
         verdict->why);
}

static void do_commit(const struct json *request, struct text *answer) {
    const char *file = json_text(request, "file"), *sha256 = json_text(request, "sha256");
    const struct json *trial = json_get(request, "trial");
    double limit_s = json_number_or(request, "limit_s", json_number_or(request, "timeout_s", 300));
    if (!is_version(file) || !is_hash(sha256) || !trial || trial->kind != J_LIST || place->lock < 0)
        fail(UNUSABLE, "it was not begun");
    const char *active = place_state(place).active;
    if (*part) {
        check_whole();
        place_heard(place, (double)part_size / SLOWEST);
        sync_part();
    }
    place_note(place, "trial", file, sha256);
    struct verdict verdict =
        try_it(trial, *part ? part : take_format("%s/%s", place->versions, file), active, limit_s);
    if (verdict.why)
        failed(sha256, &verdict);
    if (*part) {
        place_note(place, "keeping", file, sha256);
        place_keep(place, part, file);
        *part = 0;
        store_index(file, sha256);
    }
    place_note(place, "switching", file, sha256);
    place_activate(place, file);
    place_write_tries(place, sha256, 0, "");
    place_done(place);
    ok(answer);
    text_json_member(answer, "active", file);
    text_json_member(answer, "previous", place_state(place).previous);
    text_json_key(answer, "trial");
    text_add(answer, verdict.text, strlen(verdict.text));
}

static void roll_back(struct text *answer, bool beats) {
    struct state state = place_state(place);
    if (!state.previous)
        fail(UNUSABLE, "there is no version before to go back to");
    place_make(place);
    place_lock(place, owner, beats);
    place_clear(place, NULL);
    place_switch(place, state.previous, NULL);
    text_json_member(answer, "active", state.previous);
    text_json_member(answer, "left", state.active);
}

static void do_rollback(const struct json *request, struct text *answer) {
    (void)request;
    ok(answer);
    roll_back(answer, true);
}

static void do_gc(const struct json *request, struct text *answer) {
    const char *runtime = json_text_or(request, "runtime", "");
    struct state state = place_state(place);
    int64_t freed = 0;
    if (!state.active && !state.previous)
        fail(UNUSABLE, "no version is active here; deploy one first, nothing is removed");
    change();
    place_clear(place, NULL);
    struct names all = place_installed(place);
    for (size_t i = 0; i < all.count; i++) {
        const char *file = all.items[i];
        if ((state.active && !strcmp(file, state.active)) || (state.previous && !strcmp(file, state.previous)))
            continue;
        char *path = take_format("%s/%s", place->versions, file);
        freed += size_of(path);
        remove_file(path);
        remove_file(take_format("%s/%s.json", place->index, file));
    }
    remove_file(place->tries);
    struct names others = folder_names(take_format("%s/.device", place->root));
    for (size_t i = 0; i < others.count; i++)
        if (*runtime && strcmp(others.items[i], runtime))
            remove_tree(take_format("%s/.device/%s", place->root, others.items[i]));
    ok(answer);
    text_json_member_integer(answer, "freed_bytes", freed);
    names_to_json(answer, "versions", place_installed(place));
}

// --- measuring ----------------------------------------------------------------------------------

static const struct json *rows_of(const struct json *request, size_t width) {
    const struct json *files = json_get(request, "files");
    if (!files || files->kind != J_LIST)
        fail(UNUSABLE, "a request without files");
    for (size_t i = 0; i < files->length; i++) {
        bool fits = files->items[i].kind == J_LIST && files->items[i].length == width;
        for (size_t j = 0; fits && j < width; j++)
            fits = files->items[i].items[j].kind == J_TEXT;
        if (!fits || !is_version(files->items[i].items[0].text))
            fail(UNUSABLE, "a file has a wrong name");
    }
    return files;
}

static void do_there(const struct json *request, struct text *answer) {
    const struct json *files = rows_of(request, 2);
    change();
    struct names left = folder_names(place->folder);
    for (size_t i = 0; i < left.count; i++)
        if (!strncmp(left.items[i], "scratch-", 8)) // of one that was killed
            remove_tree(take_format("%s/%s", place->folder, left.items[i]));
    make_folders(scratch);
    ok(answer);
    text_json_member(answer, "scratch", scratch);
    text_json_key(answer, "there");
    text_add(answer, "[", 1);
    for (size_t i = 0; i < files->length; i++) {
        const struct json *one = files->items[i].items;
        text_json_key(answer, NULL);
        text_format(answer, "%s", is_there(one[0].text, one[1].text) ? "true" : "false");
    }
    text_add(answer, "]", 1);
}

static void do_keep(const struct json *request, struct text *answer) {
    const char *file = json_text(request, "file"), *sha256 = json_text(request, "sha256");
    if (!*part || !is_version(file) || !is_hash(sha256))
        fail(UNUSABLE, "it was not begun");
    check_whole();
    sync_part();
    place_keep(place, part, file);
    store_index(file, sha256);
    place_done(place);
    *part = 0;
    ok(answer);
}

static void do_lay(const struct json *request, struct text *answer) {
    const struct json *files = rows_of(request, 3);
    for (size_t i = 0; i < files->length; i++) {
        const struct json *one = files->items[i].items;
        if (!is_name(one[1].text) || !is_name(one[2].text))
            fail(UNUSABLE, "a file has a wrong name");
        char *folder = take_format("%s/%s", scratch, one[1].text);
        char *kept = take_format("%s/%s", place->versions, one[0].text);
        char *path = take_format("%s/%s", folder, one[2].text);
        make_folders(folder);
        remove_file(path);
        if (link(kept, path) && symlink(kept, path)) // a file system without links, too
            fail(TARGET, "%s: %s", path, system_error());
        utime(kept, NULL);
    }
    ok(answer);
}

// As text: what is no UTF-8 becomes '?', zeros go.
static char *printable(unsigned char *bytes, size_t size) {
    size_t length = 0;
    for (size_t i = 0; i < size; i++)
        if (bytes[i])
            bytes[length++] = bytes[i] < 0x80 ? bytes[i] : '?';
    bytes[length] = 0;
    return (char *)bytes;
}

static void do_read(const struct json *request, struct text *answer) {
    const struct json *patterns = json_get(request, "patterns");
    ok(answer);
    text_json_key(answer, "files");
    text_add(answer, "{", 1);
    for (size_t i = 0; patterns && patterns->kind == J_LIST && i < patterns->length; i++) {
        glob_t found;
        if (patterns->items[i].kind != J_TEXT || glob(patterns->items[i].text, 0, NULL, &found))
            continue;
        for (size_t j = 0; j < found.gl_pathc; j++) {
            unsigned char *bytes = take(MOST_READ + 1);
            int handle = open(found.gl_pathv[j], O_RDONLY | O_CLOEXEC | O_NONBLOCK);
            ssize_t size = handle < 0 ? -1 : read(handle, bytes, MOST_READ);
            if (handle >= 0)
                close(handle);
            if (size >= 0)
                text_json_member(answer, found.gl_pathv[j], printable(bytes, (size_t)size));
        }
        globfree(&found);
    }
    text_add(answer, "}", 1);
}

static struct child **child_of(const char *id) {
    for (int i = 0; i < MOST_CHILDREN; i++)
        if (children[i].child && !strcmp(children[i].id, id))
            return &children[i].child;
    return NULL;
}

static void stop(const char *id) {
    struct child **found = child_of(id);
    if (found) {
        child_end(*found);
        *found = NULL;
    }
}

static struct child *start(const char *id, const struct json *request) {
    stop(id);
    int i = 0;
    while (i < MOST_CHILDREN && children[i].child)
        i++;
    if (i == MOST_CHILDREN || strlen(id) >= sizeof children[i].id)
        fail(UNUSABLE, "too many processes, or one with too long a name");
    children[i].child = child_start(json_get(request, "command"), json_get(request, "environment"),
                                    json_get(request, "cpus"));
    strcpy(children[i].id, id);
    return children[i].child;
}

static void do_call(const struct json *request, struct text *answer) {
    int code = 0;
    int64_t begin = clock_ns(), late = begin + (int64_t)(json_number_or(request, "timeout_s", 300) * 1e9);
    struct child *child = start("call", request);
    char *said = child_rest(child, late);
    int64_t wall = clock_ns() - begin;
    bool ended = said && child_code(child, &code);
    ok(answer);
    text_json_key(answer, "code");
    text_format(answer, ended ? "%d" : "null", code);
    text_json_member(answer, "out", said ? printable((unsigned char *)said, strlen(said)) : "");
    text_json_member(answer, "words", child_last_words(child));
    text_json_member_integer(answer, "wall_ns", wall);
    stop("call");
}

static void heard_to_json(struct child *child, const struct json *request, struct text *answer) {
    char *line = child_line(child, clock_ns() + (int64_t)(json_number_or(request, "timeout_s", 300) * 1e9));
    ok(answer);
    if (!line) {
        text_json_member_truth(answer, "late", true);
    } else if (!*line) {
        int code = 0;
        bool ended = child_code(child, &code);
        text_json_key(answer, "ended");
        text_format(answer, ended ? "%d" : "null", code);
        text_json_member(answer, "words", child_last_words(child));
    } else {
        child_signal(child, SIGSTOP); // engines' threads spin for a while after a run
        text_json_member(answer, "line", line);
    }
}

static void do_start(const struct json *request, struct text *answer) {
    heard_to_json(start(json_text(request, "id"), request), request, answer);
}

static void do_ask(const struct json *request, struct text *answer) {
    const char *id = json_text(request, "id"), *line = json_text(request, "line");
    struct child **child = child_of(id);
    if (!child)
        fail(UNUSABLE, "nothing called '%.40s' was started", id);
    child_signal(*child, SIGCONT);
    child_say(*child, take_format("%s\n", line), strlen(line) + 1);
    heard_to_json(*child, request, answer);
}

static void do_stop(const struct json *request, struct text *answer) {
    stop(json_text(request, "id"));
    ok(answer);
}

struct kept {
    const char *file;
    int64_t used, size;
};

static int by_use(const void *a, const void *b) {
    const struct kept *one = a, *other = b;
    return (one->used < other->used) - (one->used > other->used);
}

// Not more than a limit is kept of what was measured, what was used last first.
static void trim(void) {
    struct stat facts;
    struct names all = place_installed(place);
    struct kept *kept = take_array(all.count, sizeof *kept);
    int64_t room = KEPT_BYTES;
    for (size_t i = 0; i < all.count; i++) {
        kept[i].file = all.items[i];
        if (!stat(take_format("%s/%s", place->versions, all.items[i]), &facts)) {
            kept[i].used = facts.st_mtime;
            kept[i].size = facts.st_size;
        }
    }
    qsort(kept, all.count, sizeof *kept, by_use);
    for (size_t i = 0; i < all.count; i++) {
        room -= kept[i].size;
        if (room >= 0)
            continue;
        unlink(take_format("%s/%s", place->versions, kept[i].file));
        unlink(take_format("%s/%s.json", place->index, kept[i].file));
    }
}

static void clean_up(void) {
    for (int i = 0; i < MOST_CHILDREN; i++)
        if (children[i].child)
            stop(children[i].id);
    if (exists(scratch)) {
        remove_tree(scratch);
        if (place->lock >= 0)
            trim();
    }
}

static void do_bye(const struct json *request, struct text *answer) {
    (void)request;
    clean_up();
    ok(answer);
    text_json_member_truth(answer, "bye", true);
}

// --- the desk -----------------------------------------------------------------------------------

static const struct {
    const char *name;
    void (*answer)(const struct json *request, struct text *answer);
} REQUESTS[] = {
    {"hello", do_hello}, {"status", do_status}, {"begin", do_begin}, {"have", do_have},
    {"take", do_take},   {"commit", do_commit}, {"rollback", do_rollback}, {"gc", do_gc},
    {"there", do_there}, {"keep", do_keep},     {"lay", do_lay},     {"read", do_read},
    {"call", do_call},   {"start", do_start},   {"ask", do_ask},     {"stop", do_stop},
    {"bye", do_bye},
};

static void answer_line(const char *line, struct text *answer) {
    const struct json *request = json_parse(line, strlen(line));
    const char *verb = json_text(request, "do");
    for (size_t i = 0; i < sizeof REQUESTS / sizeof *REQUESTS; i++)
        if (!strcmp(REQUESTS[i].name, verb)) {
            REQUESTS[i].answer(request, answer);
            text_add(answer, "}\n", 2);
            return;
        }
    fail(UNUSABLE, "no request '%.40s'", verb);
}

static void refuse(const struct fault *fault) {
    struct text answer = {0};
    text_add(&answer, "{\"ok\": false", 12);
    text_json_member(&answer, "why", fault->text);
    text_json_member_integer(&answer, "code", fault->code);
    text_add(&answer, "}\n", 2);
    write_all(1, answer.bytes, answer.length);
}

static void serve_one(const struct fault *broken) {
    struct trap trap;
    void *mark = memory_mark();
    char *line = wire_line();
    if (broken) {
        refuse(broken);
        return;
    }
    trap_open(&trap);
    if (setjmp(trap.here)) {
        refuse(&trap.fault);
        return;
    }
    struct text answer = {0};
    answer_line(line, &answer);
    trap_close(&trap);
    write_all(1, answer.bytes, answer.length);
    memory_release(mark);
}

static void heard(void) {
    if (place)
        place_heard(place, 0);
}

static void ended(void) {
    if (place)
        clean_up();
}

char *root_folder(const char *given) {
    const char *home = getenv("HOME"), *chosen = given && *given ? given : getenv("EDGEKIT_ROOT");
    if (!chosen || !*chosen)
        return take_format("%s/.local/share/edgekit", home ? home : "");
    if (*chosen == '/')
        return take_text(chosen, strlen(chosen));
    char here[4096];
    return take_format("%s/%s", getcwd(here, sizeof here) ? here : "", chosen);
}

static bool open_place(const char *root, const char *name, struct fault *fault) {
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        *fault = trap.fault;
        return false;
    }
    place = place_of(root_folder(root), name);
    trap_close(&trap);
    return true;
}

int verb_desk(const char *root, const char *name, const char *given) {
    static struct fault fault;
    owner = given;
    signal(SIGPIPE, SIG_IGN);
    bool there = open_place(root, name, &fault);
    if (there)
        snprintf(scratch, sizeof scratch, "%s/scratch-%d", place->folder, (int)getpid());
    wire_open((struct wire){heard, ended});
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here))
        return 0; // nobody reads what is said
    for (;;)
        serve_one(there ? NULL : &fault);
}

// --- the same, by hand --------------------------------------------------------------------------

static void by_hand(const struct arguments *given, const char *name) {
    place = place_of(root_folder(given->root), name);
    owner = take_format("a shell (process %d)", (int)getpid());
}

static void say(struct text *answer) {
    text_add(answer, "}", 1);
    puts(answer->bytes);
}

static void copy_to(const char *source, const char *target) {
    enum { PIECE = 1 << 20 };
    struct file file = file_open(source);
    char *piece = take(PIECE);
    int handle = open(target, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (handle < 0)
        fail(TARGET, "%s: %s", target, system_error());
    for (uint64_t at = 0; at < file.size; at += PIECE) {
        size_t size = file.size - at < PIECE ? file.size - at : PIECE;
        file_read(&file, at, piece, size);
        write_all(handle, piece, size);
    }
    bool done = !fsync(handle);
    close(handle);
    file_close(&file);
    if (!done)
        fail(TARGET, "%s: %s", target, system_error());
}

int verb_install(const struct arguments *given) {
    by_hand(given, given->name);
    struct bundle *bundle = bundle_open(given->model);
    bundle_verify(bundle);
    char *file = version_of(bundle->manifest);
    bundle_close(bundle);
    check_sequence(file, false);
    place_make(place);
    place_lock(place, owner, false);
    place_clear(place, NULL);
    const char *sha256 = hash_of(given->model, 0, -1, NULL), *active = place_state(place).active;
    check_tries(sha256);
    snprintf(part, sizeof part, "%s/%s.part", place->incoming, sha256);
    place_note(place, "receiving", file, sha256);
    copy_to(given->model, part);
    place_note(place, "trial", file, sha256);
    struct arguments trial = {.model = part, .options = given->options,
                              .active = active ? take_format("%s/%s", place->versions, active) : NULL};
    if (verb_trial(&trial)) { // it said why
        remove_file(part);
        place_done(place);
        return LIMIT;
    }
    place_note(place, "keeping", file, sha256);
    place_keep(place, part, file);
    place_note(place, "switching", file, sha256);
    place_activate(place, file);
    place_done(place);
    return 0;
}

int verb_activate(const struct arguments *given) {
    struct text answer = {0};
    const char *file = given->name;
    by_hand(given, given->model);
    struct names all = place_installed(place);
    bool found = false;
    for (size_t i = 0; i < all.count; i++)
        found |= !strcmp(all.items[i], file);
    if (!found)
        fail(UNUSABLE, "%s is not installed under '%s'; install it first", file, place->name);
    place_make(place);
    place_lock(place, owner, false);
    place_clear(place, NULL);
    place_activate(place, file);
    text_format(&answer, "{\"schema\": \"edgekit.activate/1\"");
    text_json_member(&answer, "active", file);
    text_json_member(&answer, "previous", place_state(place).previous);
    say(&answer);
    return 0;
}

int verb_rollback(const struct arguments *given) {
    struct text answer = {0};
    by_hand(given, given->model);
    text_format(&answer, "{\"schema\": \"edgekit.rollback/1\"");
    roll_back(&answer, false);
    say(&answer);
    return 0;
}

int verb_status(const struct arguments *given) {
    struct text answer = {0};
    by_hand(given, given->model);
    text_format(&answer, "{\"schema\": \"edgekit.status/1\"");
    status_to_json(&answer);
    say(&answer);
    return 0;
}
