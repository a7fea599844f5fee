// Measuring on command, for a host: `edgekit_runtime.worker`.
//
//     {"cmd": "sample", "count": 10, "untimed": 2}  ->  {"samples": [ns, ...], "cpu_ns", ...}
//     {"cmd": "throughput", "seconds": 1.5, "batch": 1}  ->  {"runs", "wall_ns", "cpu_ns", ...}
//     {"cmd": "close"}  ->  the process ends
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "fail.h"
#include "machine.h"
#include "memory.h"
#include "samples.h"
#include "verbs.h"

enum { MAX_COUNT = 1 << 20 };

struct turn {
    struct session *session;
    struct arrays *samples;
    size_t count, next;
};

static int64_t run_next(struct turn *turn) {
    const struct arrays *sample = &turn->samples[turn->next++ % turn->count];
    int64_t start = clock_ns();
    session_run(turn->session, sample);
    return clock_ns() - start;
}

static void answer_sample(struct turn *turn, const struct json *command, struct text *answer) {
    int64_t count = json_integer(command, "count"), untimed = (int64_t)json_number_or(command, "untimed", 0);
    if (count < 0 || count > MAX_COUNT || untimed < 0 || untimed > MAX_COUNT)
        fail(UNUSABLE, "%lld samples asked for; at most %d", (long long)count, MAX_COUNT);
    int64_t *taken = take_array((size_t)count, sizeof *taken);
    for (int64_t i = 0; i < untimed; i++)
        run_next(turn);
    int64_t cpu = clock_cpu_ns();
    for (int64_t i = 0; i < count; i++)
        taken[i] = run_next(turn);
    cpu = clock_cpu_ns() - cpu;
    text_add(answer, "{", 1);
    text_json_key(answer, "samples");
    samples_to_json(answer, taken, (size_t)count);
    text_json_member_integer(answer, "cpu_ns", cpu);
}

static void answer_throughput(struct turn *turn, const struct json *command, struct text *answer) {
    if (json_number_or(command, "batch", 1) != 1)
        fail(UNUSABLE, "this runner takes one sample a call; batch = 1 is wanted");
    run_next(turn);
    run_next(turn);
    int64_t cpu = clock_cpu_ns(), start = clock_ns(), runs = 0;
    int64_t end = start + (int64_t)(json_number_or(command, "seconds", 0) * 1e9);
    while (clock_ns() < end) {
        run_next(turn);
        runs++;
    }
    text_add(answer, "{", 1);
    text_json_member_integer(answer, "runs", runs);
    text_json_member_integer(answer, "wall_ns", clock_ns() - start);
    text_json_member_integer(answer, "cpu_ns", clock_cpu_ns() - cpu);
}

static void say_error(const struct fault *fault) {
    struct text answer = {0};
    text_add(&answer, "{", 1);
    text_json_member(&answer, "error", fault->text);
    text_json_member_integer(&answer, "exit_code", fault->code);
    text_add(&answer, "}", 1);
    puts(answer.bytes);
    fflush(stdout);
}

// Whether there is to be another.
static bool answer_line(struct turn *turn, const char *line) {
    struct trap trap;
    struct binding *const bound = turn->session->binding;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        if (turn->session->binding != bound) // its memory went with the trap
            turn->session->binding = NULL;
        say_error(&trap.fault);
        return true;
    }
    struct text answer = {0};
    void *mark = memory_mark();
    const struct json *command = json_parse(line, strlen(line));
    const char *what = json_text(command, "cmd");
    bool more = strcmp(what, "close");
    if (more) {
        (strcmp(what, "throughput") ? answer_sample : answer_throughput)(turn, command, &answer);
        text_json_member_integer(&answer, "peak_rss_bytes", machine_peak_rss_bytes());
        text_add(&answer, "}", 1);
        puts(answer.bytes);
        fflush(stdout);
    }
    trap_close(&trap);
    if (turn->session->binding == bound)
        memory_release(mark);
    return more;
}

static void make_ready(const struct arguments *given, struct turn *turn) {
    turn->session = session_open(given->model, &given->options);
    turn->samples = samples_from(turn->session, given->input, false, &turn->count);
    int64_t first = run_next(turn);
    turn->next = 0;
    struct text hello = {0};
    text_format(&hello, "{\"ready\": true");
    text_json_member_integer(&hello, "first_run_ns", first);
    text_json_member(&hello, "variant", turn->session->variant ? turn->session->variant->id : NULL);
    text_json_member(&hello, "passed_over", turn->session->passed_over);
    text_json_member(&hello, "engine_version", engine_version(turn->session->engine));
    text_json_member_integer(&hello, "streams", 1);
    text_format(&hello, ", \"placement\": {\"shares\": {\"CPU\": 1.0}");
    text_json_member(&hello, "delegate", engine_delegate(turn->session->engine));
    text_json_member(&hello, "precision", "float32");
    puts(take_format("%s}}", hello.bytes));
    fflush(stdout);
}

int verb_worker(const struct arguments *given) {
    struct turn turn = {0};
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        say_error(&trap.fault);
        return trap.fault.code;
    }
    make_ready(given, &turn);
    trap_close(&trap);
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, stdin) > 0 && answer_line(&turn, line))
        ;
    free(line);
    session_close(turn.session);
    return 0;
}
