// Which engines this program has, and what is the same for all.
#include "engine.h"

#include <string.h>

#include "engine_kind.h"
#include "fail.h"
#include "memory.h"

static const struct engine_kind *const KINDS[] = {&ENGINE_ONNXRUNTIME, &ENGINE_LITERT};
enum { KIND_COUNT = sizeof KINDS / sizeof *KINDS };

static const struct engine_kind *kind_of(const char *name) {
    for (size_t i = 0; i < KIND_COUNT; i++)
        if (!strcmp(KINDS[i]->name, name))
            return KINDS[i];
    return NULL;
}

bool engine_known(const char *name) { return kind_of(name); }

const char *engine_names(void) {
    char *text = "";
    for (size_t i = 0; i < KIND_COUNT; i++)
        text = take_format("%s%s%s", text, i ? ", " : "", KINDS[i]->name);
    return text;
}

const char *engine_for_suffix(const char *suffix) {
    for (size_t i = 0; i < KIND_COUNT; i++)
        if (!strcmp(KINDS[i]->suffix, suffix))
            return KINDS[i]->name;
    return NULL;
}

struct engine *engine_load(const char *name, const void *model, size_t size, int64_t threads) {
    const struct engine_kind *kind = kind_of(name);
    if (!kind)
        fail_next(NO_TOOL, "this runner has no engine '%s'; it has: %s", name, engine_names());
    struct engine *engine = kind->load(model, size, threads);
    engine->kind = kind;
    return engine;
}

void engine_close(struct engine *engine) { engine->kind->close(engine); }
const char *engine_version(const struct engine *engine) { return engine->version; }
const char *engine_delegate(const struct engine *engine) { return engine->delegate; }
struct specs engine_inputs(const struct engine *engine) { return engine->inputs; }
struct specs engine_outputs(const struct engine *engine) { return engine->outputs; }

char *engine_placement(const struct engine *engine) {
    return take_format("CPU 100 %% (%s, float32)", engine->delegate);
}

struct binding *engine_bind(struct engine *engine, int64_t (*shapes)[MAX_RANK]) {
    return engine->kind->bind(engine, shapes);
}

void engine_run(struct engine *engine, struct binding *binding) { engine->kind->run(engine, binding); }

void engine_unbind(struct engine *engine, struct binding *binding) {
    engine->kind->unbind(engine, binding);
}
