// What the runner does, one verb each; they return the exit code.
#pragma once
#include "session.h"

struct arguments {
    const char *model, *output, *input, *active, *root, *name;
    char **inputs; // `--input`, as often as it was given
    size_t input_count;
    struct options options;
    int64_t runs, max_latency_ns, timeout_s;
    int64_t started_ns; // when the process began
    bool json, tensors, cold;
};

int verb_run(const struct arguments *given);
int verb_check(const struct arguments *given);
int verb_bench(const struct arguments *given);
int verb_info(const struct arguments *given);
int verb_trial(const struct arguments *given);
int verb_worker(const struct arguments *given);
int verb_install(const struct arguments *given);
int verb_activate(const struct arguments *given);
int verb_rollback(const struct arguments *given);
int verb_status(const struct arguments *given);
// Answer a host's requests about ROOT, NAME for OWNER until it ends.
int verb_desk(const char *root, const char *name, const char *owner);
// Where bundles are installed: what is given, else EDGEKIT_ROOT, else below the home folder.
char *root_folder(const char *given);
