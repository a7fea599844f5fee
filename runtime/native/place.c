#include "place.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"
#include "fail.h"
#include "file.h"
#include "memory.h"
#include "sha256.h"

static const char SCHEMA[] = "edgekit.active/1", SUFFIX[] = ".edgekit";
static const int64_t STALE_NS = 12000000000; // of silence; hosts speak every 5 s
static const int64_t WAIT_NS = 2000000000;   // for one who is about to end
enum { MAX_JSON = 4 << 20, HOLDER_BYTES = 1000 };

static const char DIGITS[] = "0123456789", HEX[] = "0123456789abcdef";

bool is_name(const char *text) {
    static const char letters[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    size_t length = strlen(text);
    return length > 0 && length <= 64 && *text != '.' && *text != '-' && strspn(text, letters) == length;
}

bool is_version(const char *file) {
    size_t length = strlen(file), digits = strspn(file, DIGITS);
    if (length < sizeof SUFFIX || digits < 1 || digits > 20 || file[digits] != '-')
        return false;
    size_t identity = strspn(file + digits + 1, HEX);
    return identity >= 8 && identity <= 64 && !strcmp(file + digits + 1 + identity, SUFFIX);
}

bool is_hash(const char *text) { return strlen(text) == 64 && strspn(text, HEX) == 64; }

int compare_sequences(const char *one, const char *other) {
    one += strspn(one, "0");
    other += strspn(other, "0");
    size_t a = strspn(one, DIGITS), b = strspn(other, DIGITS);
    return a != b ? (a > b) - (a < b) : strncmp(one, other, a);
}

char *version_of(const struct manifest *manifest) {
    char *name = take_format("%s-%s%s", manifest->sequence, manifest->bundle_id, SUFFIX);
    if (!is_version(name))
        fail(UNUSABLE, "sequence and id give the name '%.80s', which is unfit", name);
    return name;
}

bool exists(const char *path) { return !access(path, F_OK); }

int64_t size_of(const char *path) {
    struct stat facts;
    return stat(path, &facts) ? -1 : (int64_t)facts.st_size;
}

static _Noreturn void disk(const char *path) {
    if (errno == ENOSPC || errno == EDQUOT)
        fail(TARGET, "the disk there is full; edgekit gc removes older versions");
    if (errno == EROFS)
        fail(TARGET, "the disk there is read-only");
    fail(TARGET, "%s: %s", path, system_error());
}

void make_folders(const char *path) {
    char *copy = take_text(path, strlen(path));
    for (char *p = copy + 1;; p++) {
        if (*p && *p != '/')
            continue;
        char end = *p;
        *p = 0;
        if (mkdir(copy, 0755) && errno != EEXIST)
            disk(copy);
        *p = end;
        if (!end)
            return;
    }
}

void remove_file(const char *path) {
    if (unlink(path) && errno != ENOENT)
        disk(path);
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

struct names folder_names(const char *folder) {
    struct names found = {0, NULL};
    size_t room = 0;
    DIR *opened = opendir(folder);
    if (!opened)
        return found;
    for (struct dirent *one; (one = readdir(opened));) {
        if (!strcmp(one->d_name, ".") || !strcmp(one->d_name, ".."))
            continue;
        if (found.count == room) {
            const char **items = take_array(room = room ? room * 2 : 16, sizeof(char *));
            if (found.count)
                memcpy(items, found.items, found.count * sizeof(char *));
            found.items = items;
        }
        found.items[found.count++] = take_text(one->d_name, strlen(one->d_name));
    }
    closedir(opened);
    if (found.count)
        qsort(found.items, found.count, sizeof(char *), by_name);
    return found;
}

void remove_tree(const char *path) {
    struct stat facts;
    if (lstat(path, &facts))
        return;
    if (!S_ISDIR(facts.st_mode)) {
        unlink(path);
        return;
    }
    struct names inside = folder_names(path);
    for (size_t i = 0; i < inside.count; i++)
        remove_tree(take_format("%s/%s", path, inside.items[i]));
    rmdir(path);
}

const char *hash_of(const char *path, int64_t offset, int64_t size, void (*between)(void)) {
    enum { PIECE = 1 << 18 };
    struct sha256 hash;
    char *found = take(65);
    int handle = open(path, O_RDONLY | O_CLOEXEC);
    if (handle < 0)
        return "";
    void *mark = memory_mark();
    char *piece = take(PIECE);
    sha256_begin(&hash);
    while (size) {
        size_t part = size < 0 || size > PIECE ? PIECE : (size_t)size;
        ssize_t got = pread(handle, piece, part, (off_t)offset);
        if (got <= 0)
            break;
        sha256_add(&hash, piece, (size_t)got);
        if (between)
            between();
        offset += got;
        size -= size < 0 ? 0 : got;
    }
    close(handle);
    memory_release(mark);
    if (size > 0)
        return "";
    sha256_end(&hash, found);
    return found;
}

static struct json *parse_object(const char *bytes, size_t size) {
    struct trap trap;
    static struct json none = {.kind = J_OBJECT};
    trap_open(&trap);
    if (setjmp(trap.here))
        return &none;
    struct json *found = json_parse(bytes, size);
    trap_close(&trap);
    return found->kind == J_OBJECT ? found : &none;
}

struct json *json_file(const char *path) {
    int64_t size = size_of(path);
    int handle = size < 0 || size > MAX_JSON ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (handle < 0)
        return parse_object("", 0);
    char *bytes = take((size_t)size + 1);
    ssize_t got = read(handle, bytes, (size_t)size);
    close(handle);
    return parse_object(bytes, got < 0 ? 0 : (size_t)got);
}

struct place *place_of(const char *root, const char *name) {
    if (!is_name(name))
        fail(UNUSABLE, "'%s' is no name for an installed bundle; wanted letters, digits, '.', '_', '-'",
             name);
    struct place *place = take(sizeof *place);
    char *folder = take_format("%s/%s", root, name);
    *place = (struct place){
        .name = take_text(name, strlen(name)), .root = take_text(root, strlen(root)),
        .folder = folder, .versions = take_format("%s/versions", folder),
        .index = take_format("%s/index", folder), .incoming = take_format("%s/incoming", folder),
        .active = take_format("%s/active.json", folder),
        .journal = take_format("%s/journal.json", folder),
        .tries = take_format("%s/tries.json", folder), .lock = -1};
    return place;
}

void place_make(struct place *place) {
    if (exists(place->versions) && exists(place->index) && exists(place->incoming))
        return;
    make_folders(place->versions);
    make_folders(place->index);
    make_folders(place->incoming);
    folder_sync(place->folder);
    folder_sync(place->root);
}

// --- the lock -----------------------------------------------------------------------------------

static const char *lock_owner;
static bool lock_beats;
static int64_t lock_written;

// When a process started, in ticks: what tells it from a later one of the same number.
static const char *born(int64_t pid) {
    char text[1024] = "";
    FILE *file = fopen(take_format("/proc/%lld/stat", (long long)pid), "re");
    if (!file)
        return "";
    size_t got = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[got] = 0;
    char *field = strrchr(text, ')');
    for (int i = 0; i < 20 && field; i++)
        field = strchr(field + 1, ' ');
    return field ? take_text(field + 1, strcspn(field + 1, " ")) : "";
}

static struct json *holder_of(int handle) {
    char text[HOLDER_BYTES + 1];
    ssize_t got = pread(handle, text, HOLDER_BYTES, 0);
    return parse_object(take_text(text, got < 0 ? 0 : (size_t)got), got < 0 ? 0 : (size_t)got);
}

static bool end_stale(const struct json *holder) {
    double heard = json_number_or(holder, "heard", -1), pid = json_number_or(holder, "pid", 0);
    const char *then = json_text_or(holder, "born", "");
    if (heard < 0 || pid <= 1 || (double)clock_ns() / 1e9 - heard < (double)STALE_NS / 1e9)
        return false;
    return !strcmp(born((int64_t)pid), then) && !kill((pid_t)pid, SIGKILL);
}

void place_lock(struct place *place, const char *owner, bool beats) {
    if (place->lock >= 0)
        return;
    char *path = take_format("%s/.lock", place->folder);
    int handle = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (handle < 0)
        disk(path);
    int64_t late = clock_ns() + WAIT_NS;
    while (flock(handle, LOCK_EX | LOCK_NB)) {
        struct json *holder = holder_of(handle);
        if (!end_stale(holder) && clock_ns() > late) {
            char *who = take_format("%s", json_text_or(holder, "owner", "another"));
            close(handle);
            fail(TARGET, "'%s' is being changed by %s; try again when that is done", place->name, who);
        }
        usleep(50000);
    }
    place->lock = handle;
    lock_owner = owner;
    lock_beats = beats;
    lock_written = 0;
    place_heard(place, 0);
}

void place_heard(struct place *place, double ahead_s) {
    int64_t now = clock_ns();
    if (place->lock < 0 || (lock_written && now - lock_written < 1000000000 && ahead_s <= 0))
        return;
    void *mark = memory_mark();
    lock_written = now;
    struct text text = {0};
    text_add(&text, "{", 1);
    text_json_member(&text, "owner", take_format("%.120s", lock_owner));
    text_json_member_integer(&text, "pid", getpid());
    text_json_member(&text, "born", born(getpid()));
    text_json_key(&text, "heard");
    if (lock_beats)
        text_json_number(&text, (double)now / 1e9 + ahead_s);
    else
        text_add(&text, "null", 4);
    text_add(&text, "}", 1);
    while (text.length < HOLDER_BYTES)
        text_add(&text, " ", 1);
    // on a full disk it is locked all the same
    ssize_t put = pwrite(place->lock, text.bytes, text.length, 0);
    (void)put;
    memory_release(mark);
}

// --- what is there ------------------------------------------------------------------------------

static char *there(const struct place *place, const struct json *raw, const char *key) {
    const struct json *found = json_get(raw, key);
    if (!found || found->kind != J_TEXT || !is_version(found->text))
        return NULL;
    struct stat facts;
    char *path = take_format("%s/%s", place->versions, found->text);
    return stat(path, &facts) || !S_ISREG(facts.st_mode) ? NULL : found->text;
}

struct state place_state(const struct place *place) {
    struct json *raw = json_file(place->active);
    const struct json *schema = json_get(raw, "schema");
    if (!schema || schema->kind != J_TEXT || strcmp(schema->text, SCHEMA))
        return (struct state){NULL, NULL};
    return (struct state){there(place, raw, "file"), there(place, raw, "previous")};
}

void place_switch(const struct place *place, const char *file, const char *previous) {
    struct text text = {0};
    text_add(&text, "{", 1);
    text_json_member(&text, "schema", SCHEMA);
    text_json_member(&text, "file", file);
    text_json_member(&text, "previous", previous);
    text_add(&text, "}", 1);
    file_replace(place->active, text.bytes, text.length, true);
}

void place_activate(const struct place *place, const char *file) {
    struct state state = place_state(place);
    if (!state.active || strcmp(state.active, file))
        place_switch(place, file, state.active ? state.active : state.previous);
}

void place_keep(const struct place *place, const char *part, const char *file) {
    char *path = take_format("%s/%s", place->versions, file);
    if (chmod(part, 0644) || rename(part, path))
        disk(path);
    folder_sync(place->versions);
    folder_sync(place->incoming);
}

bool place_holds(const struct place *place, const char *file, const char *sha256,
                 void (*between)(void)) {
    return !strcmp(hash_of(take_format("%s/%s", place->versions, file), 0, -1, between), sha256);
}

static int by_sequence(const void *a, const void *b) {
    const char *one = *(const char *const *)a, *other = *(const char *const *)b;
    int order = compare_sequences(one, other);
    return order ? order : strcmp(one, other);
}

struct names place_installed(const struct place *place) {
    struct names all = folder_names(place->versions), kept = {0, all.items};
    for (size_t i = 0; i < all.count; i++)
        if (is_version(all.items[i]))
            kept.items[kept.count++] = all.items[i];
    if (kept.count)
        qsort(kept.items, kept.count, sizeof(char *), by_sequence);
    return kept;
}

void place_clear(const struct place *place, const char *keep) {
    const char *folders[] = {place->folder, place->versions, place->index};
    for (int f = 0; f < 3; f++) {
        struct names left = folder_names(folders[f]);
        for (size_t i = 0; i < left.count; i++)
            if (!strncmp(left.items[i], ".new-", 5))
                remove_file(take_format("%s/%s", folders[f], left.items[i]));
    }
    struct names parts = folder_names(place->incoming), index = folder_names(place->index);
    char *kept = take_format("%s.part", keep ? keep : "");
    for (size_t i = 0; i < parts.count; i++)
        if (strcmp(parts.items[i], kept))
            remove_file(take_format("%s/%s", place->incoming, parts.items[i]));
    for (size_t i = 0; i < index.count; i++) {
        int length = (int)strlen(index.items[i]) - (int)strlen(".json");
        if (length < 0 || !exists(take_format("%s/%.*s", place->versions, length, index.items[i])))
            remove_file(take_format("%s/%s", place->index, index.items[i]));
    }
    if (!keep)
        place_done(place);
}

void place_done(const struct place *place) {
    if (!exists(place->journal))
        return;
    remove_file(place->journal);
    folder_sync(place->folder);
}

void place_note(const struct place *place, const char *step, const char *file, const char *sha256) {
    struct text text = {0};
    text_add(&text, "{", 1);
    text_json_member(&text, "step", step);
    text_json_member(&text, "file", file);
    text_json_member(&text, "sha256", sha256);
    text_add(&text, "}", 1);
    file_replace(place->journal, text.bytes, text.length, false);
}

struct json *place_tries(const struct place *place) { return json_file(place->tries); }

// `count` 0: none any more.
void place_write_tries(const struct place *place, const char *sha256, int64_t count, const char *why) {
    struct json *old = place_tries(place);
    struct text text = {0};
    if (!count && !json_get(old, sha256))
        return;
    text_add(&text, "{", 1);
    for (size_t i = 0; i < old->length; i++) {
        if (!strcmp(old->keys[i].text, sha256))
            continue;
        text_json_key(&text, old->keys[i].text);
        text_add(&text, "{", 1);
        text_json_member_integer(&text, "count", (int64_t)json_number_or(&old->items[i], "count", 0));
        text_json_member(&text, "why", json_text_or(&old->items[i], "why", ""));
        text_add(&text, "}", 1);
    }
    if (count) {
        text_json_key(&text, sha256);
        text_add(&text, "{", 1);
        text_json_member_integer(&text, "count", count);
        text_json_member(&text, "why", take_format("%.200s", why));
        text_add(&text, "}", 1);
    }
    text_add(&text, "}", 1);
    file_replace(place->tries, text.bytes, text.length, true);
}
