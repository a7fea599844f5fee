// The verbs that change what is installed without a host.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "desk.h"
#include "fail.h"
#include "file.h"
#include "memory.h"
#include "verbs.h"

static void by_hand(const struct arguments *given, const char *name) {
    desk.place = place_of(root_folder(given->root), name);
    desk.owner = take_format("a shell (process %d)", (int)getpid());
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
    place_make(desk.place);
    place_lock(desk.place, desk.owner, false);
    place_clear(desk.place, NULL);
    const char *sha256 = hash_of(given->model, 0, -1, NULL), *active = place_state(desk.place).active;
    check_tries(sha256);
    char *part = take_format("%s/%s.part", desk.place->incoming, sha256);
    place_note(desk.place, "receiving", file, sha256);
    copy_to(given->model, part);
    if (strcmp(hash_of(part, 0, -1, NULL), sha256))
        fail(TARGET, "%s changed while it was copied; try again", given->model);
    place_note(desk.place, "trial", file, sha256);
    struct arguments trial = {.model = part, .options = given->options,
                              .active = active ? take_format("%s/%s", desk.place->versions, active) : NULL};
    if (verb_trial(&trial)) { // it said why
        remove_file(part);
        place_done(desk.place);
        return LIMIT;
    }
    place_note(desk.place, "keeping", file, sha256);
    place_keep(desk.place, part, file);
    place_note(desk.place, "switching", file, sha256);
    place_activate(desk.place, file);
    place_done(desk.place);
    return 0;
}

int verb_activate(const struct arguments *given) {
    struct text answer = {0};
    const char *file = given->name;
    by_hand(given, given->model);
    struct names all = place_installed(desk.place);
    bool found = false;
    for (size_t i = 0; i < all.count; i++)
        found |= !strcmp(all.items[i], file);
    if (!found)
        fail(UNUSABLE, "%s is not installed under '%s'; install it first", file, desk.place->name);
    place_make(desk.place);
    place_lock(desk.place, desk.owner, false);
    place_clear(desk.place, NULL);
    place_activate(desk.place, file);
    text_format(&answer, "{\"schema\": \"edgekit.activate/1\"");
    text_json_member(&answer, "active", file);
    text_json_member(&answer, "previous", place_state(desk.place).previous);
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
