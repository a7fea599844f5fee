// A verified bundle's variant, or a plain model, in an engine.
#pragma once
#include "bundle.h"
#include "engine.h"

struct options {
    const char *variant, *engine; // NULL: the first that runs here; the format's own
    int64_t threads;              // 0: the variant's
};

struct session {
    struct bundle *bundle;   // NULL for a plain model
    struct manifest *manifest;
    struct variant *variant;
    const char *passed_over; // the variants before it, and why; "" if none
    struct specs inputs, outputs; // ours
    struct engine *engine;
    struct binding *binding; // for the shapes of the last run
    size_t *input_of, *output_of; // the engine's number -> ours
    struct arrays results;   // over the engine's, in our order and with our names
};

// Fails with UNUSABLE, NO_TOOL or LIMIT (placement, memory). What is passed over is said on stderr.
struct session *session_open(const char *path, const struct options *options);
struct session *session_of(struct bundle *bundle, const struct options *options);
void session_close(struct session *session);

// Buffers for inputs of these names, dtypes and shapes; fails with UNUSABLE if they do not fit.
void session_fit(struct session *session, const struct arrays *inputs);
void session_fill(struct session *session, const struct arrays *inputs);
void session_invoke(struct session *session);
// All three; the results are valid until the next call.
const struct arrays *session_run(struct session *session, const struct arrays *inputs);
// Seeded noise in each input's known range, 0..1 otherwise.
struct arrays session_noise(const struct session *session);
