// Installs bundles and measures for a host, which speaks in lines of JSON: the requests and their
// answers are those of `edgekit_runtime.installer` and `edgekit_runtime.workbench`.
#include "desk.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "fail.h"
#include "file.h"
#include "machine.h"
#include "memory.h"
#include "verbs.h"
#include "wire.h"

struct desk desk;

void answer_ok(struct text *answer) { text_format(answer, "{\"ok\": true"); }

void desk_change(void) {
    place_make(desk.place);
    place_lock(desk.place, desk.owner, true);
    wire_be_strict();
}

void desk_listen(void) { wire_wait(-1, 0); }

static void names_to_json(struct text *answer, const char *key, struct names names) {
    text_json_key(answer, key);
    text_add(answer, "[", 1);
    for (size_t i = 0; i < names.count; i++) {
        text_json_key(answer, NULL);
        text_json_string(answer, names.items[i]);
    }
    text_add(answer, "]", 1);
}

void status_to_json(struct text *answer) {
    struct state state = place_state(desk.place);
    struct json *journal = json_file(desk.place->journal), *tries = place_tries(desk.place);
    text_json_member(answer, "name", desk.place->name);
    text_json_member(answer, "active", state.active);
    text_json_member(answer, "previous", state.previous);
    names_to_json(answer, "versions", place_installed(desk.place));
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
    answer_ok(answer);
    text_json_member(answer, "root", desk.place->root);
    text_json_member(answer, "machine", machine_name());
    text_json_member(answer, "model", NULL);
    text_json_member(answer, "python", NULL);
    text_json_member_truth(answer, "runtime", exists(take_format("%s/.device/%s", desk.place->root, runtime)));
}

static void do_status(const struct json *request, struct text *answer) {
    (void)request;
    answer_ok(answer);
    status_to_json(answer);
}

void roll_back(struct text *answer, bool beats) {
    struct state state = place_state(desk.place);
    if (!state.previous)
        fail(UNUSABLE, "there is no version before to go back to");
    place_make(desk.place);
    place_lock(desk.place, desk.owner, beats);
    place_clear(desk.place, NULL);
    place_switch(desk.place, state.previous, NULL);
    text_json_member(answer, "active", state.previous);
    text_json_member(answer, "left", state.active);
}

static void do_rollback(const struct json *request, struct text *answer) {
    (void)request;
    answer_ok(answer);
    roll_back(answer, true);
}

static void do_gc(const struct json *request, struct text *answer) {
    const char *runtime = json_text_or(request, "runtime", "");
    struct state state = place_state(desk.place);
    int64_t freed = 0;
    if (!state.active && !state.previous)
        fail(UNUSABLE, "no version is active here; deploy one first, nothing is removed");
    desk_change();
    place_clear(desk.place, NULL);
    struct names all = place_installed(desk.place);
    for (size_t i = 0; i < all.count; i++) {
        const char *file = all.items[i];
        if ((state.active && !strcmp(file, state.active)) || (state.previous && !strcmp(file, state.previous)))
            continue;
        char *path = take_format("%s/%s", desk.place->versions, file);
        freed += size_of(path);
        remove_file(path);
        remove_file(take_format("%s/%s.json", desk.place->index, file));
    }
    remove_file(desk.place->tries);
    struct names others = folder_names(take_format("%s/.device", desk.place->root));
    for (size_t i = 0; i < others.count; i++)
        if (*runtime && strcmp(others.items[i], runtime))
            remove_tree(take_format("%s/.device/%s", desk.place->root, others.items[i]));
    answer_ok(answer);
    text_json_member_integer(answer, "freed_bytes", freed);
    names_to_json(answer, "versions", place_installed(desk.place));
}

static void do_bye(const struct json *request, struct text *answer) {
    (void)request;
    errands_close();
    answer_ok(answer);
    text_json_member_truth(answer, "bye", true);
}

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

static void serve(const char *line) {
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        refuse(&trap.fault);
        return;
    }
    struct text answer = {0};
    answer_line(line, &answer);
    trap_close(&trap);
    write_all(1, answer.bytes, answer.length);
}

// `broken`: there is no place to serve, and every request is told why.
static void serve_one(const struct fault *broken) {
    void *mark = memory_mark();
    char *line = wire_line();
    if (broken)
        refuse(broken);
    else
        serve(line);
    memory_release(mark);
}

static void heard(void) {
    if (desk.place)
        place_heard(desk.place, 0);
}

static void ended(void) {
    if (desk.place)
        errands_close();
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
    desk.place = place_of(root_folder(root), name);
    errands_open();
    trap_close(&trap);
    return true;
}

int verb_desk(const char *root, const char *name, const char *given) {
    static struct fault fault;
    desk.owner = given;
    signal(SIGPIPE, SIG_IGN);
    bool there = open_place(root, name, &fault);
    wire_open((struct wire){heard, ended});
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here))
        return 0; // nobody reads what is said
    for (;;)
        serve_one(there ? NULL : &fault);
}
