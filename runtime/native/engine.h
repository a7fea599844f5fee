// A model in an engine, on buffers that are bound once.
#pragma once
#include "array.h"

struct engine;

// Whether this program has an engine of that name; all it has.
bool engine_known(const char *name);
const char *engine_names(void);
// The engine for plain models with this suffix (".onnx"); NULL without.
const char *engine_for_suffix(const char *suffix);
// Fails with UNUSABLE: the model is damaged; NO_TOOL: there is no such engine, or it is too old.
struct engine *engine_load(const char *name, const void *model, size_t size, int64_t threads);
void engine_close(struct engine *engine);
const char *engine_version(const struct engine *engine);
// The model's own names, dtypes and shapes.
struct specs engine_inputs(const struct engine *engine);
struct specs engine_outputs(const struct engine *engine);

// What is placed where, as a sentence: this program registers no accelerator, so engines have the
// CPU alone.
char *engine_placement(const struct engine *engine);
const char *engine_delegate(const struct engine *engine); // the part of it that computes

struct binding {
    struct arrays inputs;  // filled by the caller, in the order of engine_inputs
    struct arrays outputs; // valid after a run, until the next one
    void *values;
};

// Buffers for these shapes. Fails with NO_TOOL where the engine refuses them.
struct binding *engine_bind(struct engine *engine, int64_t (*shapes)[MAX_RANK]);
void engine_run(struct engine *engine, struct binding *binding);
void engine_unbind(struct engine *engine, struct binding *binding);
