// edgekit-run: runs, checks, times and installs bundles on devices without Python.
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "fail.h"
#include "memory.h"
#include "verbs.h"

static const char USAGE[] =
    "usage: edgekit-run VERB ...\n"
    "  run MODEL --input [NAME=]FILE ... [--tensors] [--output FILE] [--json]\n"
    "  check BUNDLE [--json]            compare golden outputs with what is computed here\n"
    "  bench MODEL [--runs N] [--input FILE] [--tensors] [--cold] [--json]\n"
    "  info MODEL [--json]              what is in the bundle or model\n"
    "     all of them: [--variant ID] [--threads N] [--engine E]\n"
    "  install BUNDLE --as NAME [--root FOLDER]    try it, keep it, activate it\n"
    "  activate NAME VERSION | rollback NAME | status NAME    [--root FOLDER]\n"
    "MODEL is a bundle (.edgekit), an .onnx or a .tflite; verbs print what edgekit-runtime prints.\n";

enum { VARIANT = 256, THREADS, ENGINE, JSON, INPUT, OUTPUT, TENSORS, RUNS, COLD, AS, ROOT, ACTIVE,
       MAX_LATENCY, TIMEOUT, PRECISION, INTENT };

static const struct option OPTIONS[] = {
    {"variant", required_argument, NULL, VARIANT}, {"threads", required_argument, NULL, THREADS},
    {"engine", required_argument, NULL, ENGINE},   {"json", no_argument, NULL, JSON},
    {"input", required_argument, NULL, INPUT},     {"output", required_argument, NULL, OUTPUT},
    {"tensors", no_argument, NULL, TENSORS},       {"runs", required_argument, NULL, RUNS},
    {"cold", no_argument, NULL, COLD},             {"as", required_argument, NULL, AS},
    {"root", required_argument, NULL, ROOT},       {"active", required_argument, NULL, ACTIVE},
    {"max-latency-ns", required_argument, NULL, MAX_LATENCY},
    {"timeout", required_argument, NULL, TIMEOUT}, {"precision", required_argument, NULL, PRECISION},
    {"intent", required_argument, NULL, INTENT},   {NULL, 0, NULL, 0}};

static const struct {
    const char *name;
    int (*run)(const struct arguments *given);
    int words; // that it takes
} VERBS[] = {
    {"run", verb_run, 1},         {"check", verb_check, 1},       {"bench", verb_bench, 1},
    {"info", verb_info, 1},       {"trial", verb_trial, 1},       {"worker", verb_worker, 1},
    {"install", verb_install, 1}, {"activate", verb_activate, 2}, {"rollback", verb_rollback, 1},
    {"status", verb_status, 1},
};

static int64_t whole(const char *text, const char *option, int64_t low, int64_t high) {
    char *end;
    long long found = strtoll(text, &end, 10);
    if (!*text || *end || found < low || found > high)
        fail(UNUSABLE, "--%s is %s; wanted %lld to %lld", option, text, (long long)low, (long long)high);
    return found;
}

static void take_option(struct arguments *given, int option, const char *value) {
    switch (option) {
    case VARIANT: given->options.variant = value; break;
    case THREADS: given->options.threads = whole(value, "threads", 1, 1024); break;
    case ENGINE: given->options.engine = value; break;
    case JSON: given->json = true; break;
    case OUTPUT: given->output = value; break;
    case TENSORS: given->tensors = true; break;
    case RUNS: given->runs = whole(value, "runs", 1, 10000000); break;
    case COLD: given->cold = true; break;
    case AS: given->name = value; break;
    case ROOT: given->root = value; break;
    case ACTIVE: given->active = value; break;
    case MAX_LATENCY: given->max_latency_ns = whole(value, "max-latency-ns", 1, INT64_MAX); break;
    case TIMEOUT: given->timeout_s = whole(value, "timeout", 1, 1 << 30); break;
    case INPUT:
        given->input = value;
        given->inputs[given->input_count++] = (char *)value;
        break;
    case PRECISION:
        if (strcmp(value, "float32"))
            fail(UNUSABLE, "this runner computes floats in float32; %s was asked for", value);
        break;
    case INTENT:
        if (strcmp(value, "latency"))
            fail(UNUSABLE, "this runner runs one call at a time; --intent %s was asked for", value);
        break;
    default: fail(UNUSABLE, "an unknown option, or one without its value");
    }
}

static int run_verb(int count, char **words, int64_t started_ns) {
    const char *verb = words[1];
    if (!strcmp(verb, "desk") && count == 5)
        return verb_desk(words[2], words[3], words[4]);
    struct arguments given = {.runs = 200, .started_ns = started_ns};
    given.inputs = take_array((size_t)count, sizeof(char *));
    opterr = 0;
    optind = 2;
    for (int option; (option = getopt_long(count, words, "", OPTIONS, NULL)) != -1;)
        take_option(&given, option, optarg);
    for (size_t i = 0; i < sizeof VERBS / sizeof *VERBS; i++) {
        if (strcmp(VERBS[i].name, verb))
            continue;
        if (count - optind != VERBS[i].words)
            fail(UNUSABLE, "%s takes %d words; see edgekit-run without any", verb, VERBS[i].words);
        given.model = words[optind];
        if (VERBS[i].words == 2)
            given.name = words[optind + 1];
        if (VERBS[i].run == verb_install && !given.name)
            fail(UNUSABLE, "install wants --as NAME");
        if (VERBS[i].run == verb_run && !given.input_count)
            fail(UNUSABLE, "run wants --input FILE");
        return VERBS[i].run(&given);
    }
    fail(UNUSABLE, "no verb '%s'; see edgekit-run without any", verb);
}

int main(int count, char **words) {
    int64_t started_ns = clock_ns();
    if (count < 2 || !strcmp(words[1], "--help")) {
        fputs(USAGE, count < 2 ? stderr : stdout);
        return count < 2 ? UNUSABLE : 0;
    }
    signal(SIGPIPE, SIG_IGN);
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        fflush(stdout);
        fprintf(stderr, "edgekit-runtime: %s\n", trap.fault.text);
        return trap.fault.code;
    }
    int code = run_verb(count, words, started_ns);
    if (fflush(stdout) || ferror(stdout))
        fail(TARGET, "what it says cannot be written: %s", system_error());
    trap_close(&trap);
    return code;
}
