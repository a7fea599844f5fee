// What an engine's file provides to `engine.c`.
#pragma once
#include "engine.h"

struct engine_kind {
    const char *name, *suffix; // of plain models
    struct engine *(*load)(const void *model, size_t size, int64_t threads);
    void (*close)(struct engine *engine);
    struct binding *(*bind)(struct engine *engine, int64_t (*shapes)[MAX_RANK]);
    void (*run)(struct engine *engine, struct binding *binding);
    void (*unbind)(struct engine *engine, struct binding *binding);
};

// What an engine's own struct begins with.
struct engine {
    const struct engine_kind *kind;
    const char *version, *delegate;
    struct specs inputs, outputs;
};

extern const struct engine_kind ENGINE_ONNXRUNTIME, ENGINE_LITERT;
