// Measuring for a host: files that are kept for it, and processes that are started and asked.
#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utime.h>

#include "clock.h"
#include "desk.h"
#include "fail.h"
#include "memory.h"

enum { MOST_READ = 1 << 16, MOST_CHILDREN = 64 };
static const int64_t KEPT_BYTES = 256 << 20; // of files that were measured, for the next time

static char scratch[4096];
static struct {
    char id[64];
    struct child *child;
} children[MOST_CHILDREN];

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

void do_there(const struct json *request, struct text *answer) {
    const struct json *files = rows_of(request, 2);
    desk_change();
    struct names left = folder_names(desk.place->folder);
    for (size_t i = 0; i < left.count; i++) {
        char *path = take_format("%s/%s", desk.place->folder, left.items[i]);
        if (!strncmp(left.items[i], "scratch-", 8) && strcmp(path, scratch)) // of one that was killed
            remove_tree(path);
    }
    make_folders(scratch);
    answer_ok(answer);
    text_json_member(answer, "scratch", scratch);
    text_json_key(answer, "there");
    text_add(answer, "[", 1);
    for (size_t i = 0; i < files->length; i++) {
        const struct json *one = files->items[i].items;
        text_json_key(answer, NULL);
        text_format(answer, "%s", place_holds(desk.place, one[0].text, one[1].text, desk_listen) ? "true" : "false");
    }
    text_add(answer, "]", 1);
}

void do_lay(const struct json *request, struct text *answer) {
    const struct json *files = rows_of(request, 3);
    for (size_t i = 0; i < files->length; i++) {
        const struct json *one = files->items[i].items;
        if (!is_name(one[1].text) || !is_name(one[2].text))
            fail(UNUSABLE, "a file has a wrong name");
        char *folder = take_format("%s/%s", scratch, one[1].text);
        char *kept = take_format("%s/%s", desk.place->versions, one[0].text);
        char *path = take_format("%s/%s", folder, one[2].text);
        make_folders(folder);
        remove_file(path);
        if (link(kept, path) && symlink(kept, path)) // a file system without links, too
            fail(TARGET, "%s: %s", path, system_error());
        utime(kept, NULL);
    }
    answer_ok(answer);
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

void do_read(const struct json *request, struct text *answer) {
    const struct json *patterns = json_get(request, "patterns");
    answer_ok(answer);
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

void errand_end(const char *id) {
    struct child **found = child_of(id);
    if (found) {
        child_end(*found);
        *found = NULL;
    }
}

struct child *errand_start(const char *id, const struct json *command,
                           const struct json *environment, const struct json *cpus) {
    errand_end(id);
    int i = 0;
    while (i < MOST_CHILDREN && children[i].child)
        i++;
    if (i == MOST_CHILDREN || strlen(id) >= sizeof children[i].id)
        fail(UNUSABLE, "too many processes, or one with too long a name");
    children[i].child = child_start(command, environment, cpus);
    strcpy(children[i].id, id);
    return children[i].child;
}

static struct child *start(const char *id, const struct json *request) {
    return errand_start(id, json_get(request, "command"), json_get(request, "environment"),
                        json_get(request, "cpus"));
}

void do_call(const struct json *request, struct text *answer) {
    int code = 0;
    int64_t begin = clock_ns(), late = begin + (int64_t)(json_number_or(request, "timeout_s", 300) * 1e9);
    struct child *child = start("call", request);
    char *said = child_rest(child, late);
    int64_t wall = clock_ns() - begin;
    bool ended = said && child_code(child, &code);
    answer_ok(answer);
    text_json_key(answer, "code");
    text_format(answer, ended ? "%d" : "null", code);
    text_json_member(answer, "out", said ? printable((unsigned char *)said, strlen(said)) : "");
    text_json_member(answer, "words", child_last_words(child));
    text_json_member_integer(answer, "wall_ns", wall);
    errand_end("call");
}

static void heard_to_json(struct child *child, const struct json *request, struct text *answer) {
    char *line = child_line(child, clock_ns() + (int64_t)(json_number_or(request, "timeout_s", 300) * 1e9));
    answer_ok(answer);
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

void do_start(const struct json *request, struct text *answer) {
    heard_to_json(start(json_text(request, "id"), request), request, answer);
}

void do_ask(const struct json *request, struct text *answer) {
    const char *id = json_text(request, "id"), *line = json_text(request, "line");
    struct child **child = child_of(id);
    if (!child)
        fail(UNUSABLE, "nothing called '%.40s' was started", id);
    child_signal(*child, SIGCONT);
    child_say(*child, take_format("%s\n", line), strlen(line) + 1);
    heard_to_json(*child, request, answer);
}

void do_stop(const struct json *request, struct text *answer) {
    errand_end(json_text(request, "id"));
    answer_ok(answer);
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
    struct names all = place_installed(desk.place);
    struct kept *kept = take_array(all.count, sizeof *kept);
    int64_t room = KEPT_BYTES;
    for (size_t i = 0; i < all.count; i++) {
        kept[i].file = all.items[i];
        if (!stat(take_format("%s/%s", desk.place->versions, all.items[i]), &facts)) {
            kept[i].used = facts.st_mtime;
            kept[i].size = facts.st_size;
        }
    }
    qsort(kept, all.count, sizeof *kept, by_use);
    for (size_t i = 0; i < all.count; i++) {
        room -= kept[i].size;
        if (room >= 0)
            continue;
        unlink(take_format("%s/%s", desk.place->versions, kept[i].file));
        unlink(take_format("%s/%s.json", desk.place->index, kept[i].file));
    }
}

void errands_open(void) {
    int length = snprintf(scratch, sizeof scratch, "%s/scratch-%d", desk.place->folder, (int)getpid());
    if ((size_t)length >= sizeof scratch)
        fail(UNUSABLE, "the folder's name is too long");
}

void errands_close(void) {
    for (int i = 0; i < MOST_CHILDREN; i++)
        if (children[i].child)
            errand_end(children[i].id);
    if (exists(scratch)) {
        remove_tree(scratch);
        if (desk.place->lock >= 0)
            trim();
    }
}
