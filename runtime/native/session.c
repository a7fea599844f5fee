#include "session.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "fail.h"
#include "machine.h"
#include "memory.h"

enum { MAX_THREADS = 1024 };
static const size_t MAX_MODEL = (size_t)2 << 30;

static void check_machine(const struct variant *variant) {
    char *wanted = "";
    for (size_t i = 0; i < variant->machines.count; i++) {
        if (!strcmp(variant->machines.items[i], machine_name()))
            return;
        wanted = take_format("%s%s%s", wanted, i ? ", " : "", variant->machines.items[i]);
    }
    if (variant->machines.count)
        fail_next(UNUSABLE, "variant '%s' is for %s, this is %s", variant->id, wanted, machine_name());
}

static void check_memory(const struct variant *variant) {
    int64_t free_bytes = machine_free_memory_bytes(), own = machine_rss_bytes();
    int64_t more = variant->memory_bytes - (own < 0 ? 0 : own);
    if (variant->memory_bytes >= 0 && free_bytes >= 0 && more > free_bytes)
        fail_next(LIMIT, "variant '%s' needs %.0f MB more, %.0f MB are free", variant->id,
                  (double)more / 1e6, (double)free_bytes / 1e6);
}

static void warn(const char *text) { fprintf(stderr, "edgekit-runtime: FallbackWarning: %s\n", text); }

// This program runs all of a model on the CPU: what is promised of another device is not kept.
static void check_placement(const struct variant *variant, const struct engine *engine) {
    for (size_t i = 0; i < variant->shares; i++) {
        const struct share *one = &variant->placement[i];
        double share = strcmp(one->device, "CPU") ? 0 : 1;
        if (share + 1e-6 >= one->share)
            continue;
        char *text = take_format(
            "variant '%s': %.4g %% of its operators are on %s, wanted %.4g %% (%s); refused: nothing "
            "falls back in silence", variant->id, 100 * share, one->device, 100 * one->share,
            engine_placement(engine));
        if (!strcmp(variant->on_misplacement, "warn"))
            warn(text);
        else if (!strcmp(variant->on_misplacement, "next"))
            fail_next(LIMIT, "%s", text);
        else
            fail(LIMIT, "%s", text);
    }
}

static bool compatible(const struct spec *ours, const struct spec *engines) {
    bool same = ours->rank == engines->rank && !strcmp(ours->dtype, engines->dtype);
    for (size_t i = 0; i < ours->rank && same; i++)
        same = !ours->shape[i].size || !engines->shape[i].size ||
               ours->shape[i].size == engines->shape[i].size;
    return same;
}

// The engine's number -> ours; `names` are the engine's names in our order.
static size_t *match(const struct specs *ours, const struct specs *engines, const char **names,
                     const char *what) {
    size_t *found = take_array(engines->count, sizeof *found);
    for (size_t i = 0; i < engines->count; i++) {
        size_t j = 0;
        while (j < ours->count && strcmp(names ? names[j] : ours->items[j].name, engines->items[i].name))
            j++;
        if (j == ours->count)
            fail(UNUSABLE, "the model has the %s '%s', the manifest does not", what,
                 engines->items[i].name);
        if (!compatible(&ours->items[j], &engines->items[i]))
            fail(UNUSABLE, "the model's %s is %s, the manifest says %s", what,
                 spec_text(&engines->items[i]), spec_text(&ours->items[j]));
        found[i] = j;
    }
    if (engines->count != ours->count)
        fail(UNUSABLE, "the manifest has %zu %ss, the model %zu", ours->count, what, engines->count);
    return found;
}

static void attach(struct session *session, struct engine *engine, const char **in, const char **out) {
    struct specs inputs = engine_inputs(engine), outputs = engine_outputs(engine);
    session->engine = engine;
    session->input_of = match(&session->inputs, &inputs, in, "input");
    session->output_of = match(&session->outputs, &outputs, out, "output");
    size_t count = session->outputs.count;
    session->results = (struct arrays){count, take_array(count, sizeof(struct array))};
}

static int64_t threads_of(const struct options *options, int64_t usual) {
    int64_t threads = options->threads ? options->threads : usual;
    if (threads < 1 || threads > MAX_THREADS)
        fail(UNUSABLE, "%lld threads asked for; wanted 1 to %d", (long long)threads, MAX_THREADS);
    return threads;
}

static void open_variant(struct session *session, struct variant *variant,
                         const struct options *options) {
    size_t size;
    check_machine(variant);
    check_memory(variant);
    if (!engine_known(variant->engine))
        fail_next(NO_TOOL, "this runner has no engine '%s'; it has: %s", variant->engine,
                  engine_names());
    if (strcmp(variant->precision, "float32"))
        fail(UNUSABLE, "%s computes floats in float32; %s was asked for", variant->engine,
             variant->precision);
    if (variant->files.count != 1)
        fail(UNUSABLE, "a variant for %s is one file, found %zu", variant->engine, variant->files.count);
    unsigned char *model = bundle_read(session->bundle, variant->files.items[0], &size);
    struct engine *engine =
        engine_load(variant->engine, model, size, threads_of(options, variant->threads));
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        engine_close(engine); // or it would hold its memory beside the next variant's
        fail_again(&trap.fault);
    }
    attach(session, engine, variant->input_names.items, variant->output_names.items);
    check_placement(variant, engine);
    trap_close(&trap);
    session->variant = variant;
}

// Whether it runs; if not, why goes into `passed`.
static bool try_variant(struct session *session, struct variant *variant,
                        const struct options *options, struct fault *why) {
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        if (!trap.fault.next)
            fail_again(&trap.fault);
        *why = trap.fault;
        return false;
    }
    open_variant(session, variant, options);
    trap_close(&trap);
    return true;
}

struct session *session_of(struct bundle *bundle, const struct options *options) {
    struct session *session = take(sizeof *session);
    struct manifest *manifest = bundle->manifest;
    *session = (struct session){.bundle = bundle, .manifest = manifest, .passed_over = "",
                                .inputs = manifest->inputs, .outputs = manifest->outputs};
    bundle_verify(bundle); // all of it, even what is not used
    struct variant *first = manifest_variant(manifest, options->variant);
    size_t count = options->variant ? 1 : manifest->variants;
    struct fault why;
    char *passed = "";
    for (size_t i = 0; i < count; i++) {
        if (try_variant(session, &first[i], options, &why)) {
            if (*passed)
                warn(take_format("%s: runs variant '%s'; not %s", bundle->path, first[i].id, passed));
            session->passed_over = passed;
            return session;
        }
        passed = take_format("%s%s%s: %s", passed, *passed ? "; not " : "", first[i].id, why.text);
    }
    if (count == 1)
        fail(why.code, "%s: %s", bundle->path, why.text);
    fail(why.code, "%s: no variant runs here: %s", bundle->path, passed);
}

struct session *session_open(const char *path, const struct options *options) {
    if (is_bundle(path)) {
        if (options->engine)
            fail(UNUSABLE, "%s is a bundle: choose one of its variants, not the engine", path);
        return session_of(bundle_open(path), options);
    }
    if (options->variant)
        fail(UNUSABLE, "%s is a plain model; only bundles have variants", path);
    const char *suffix = strrchr(path, '.');
    const char *usual = suffix ? engine_for_suffix(suffix) : NULL;
    if (!usual)
        fail(UNUSABLE, "%s is not a model this runner loads; known: .edgekit, .onnx, .tflite", path);
    size_t size;
    unsigned char *model = file_whole(path, MAX_MODEL, &size);
    if (!size)
        fail(UNUSABLE, "%s is empty", path);
    struct session *session = take(sizeof *session);
    struct engine *engine = engine_load(options->engine ? options->engine : usual, model, size,
                                        threads_of(options, 1));
    session->passed_over = "";
    session->inputs = engine_inputs(engine);
    session->outputs = engine_outputs(engine);
    attach(session, engine, NULL, NULL);
    return session;
}

void session_close(struct session *session) {
    if (session->binding)
        engine_unbind(session->engine, session->binding);
    engine_close(session->engine);
    if (session->bundle)
        bundle_close(session->bundle);
}

static char *names_of(const struct arrays *arrays) {
    char *text = "";
    for (size_t i = 0; i < arrays->count; i++)
        text = take_format("%s%s%s", text, i ? ", " : "", arrays->items[i].name);
    return *text ? text : "nothing";
}

static char *spec_names(const struct specs *specs) {
    char *text = "";
    for (size_t i = 0; i < specs->count; i++)
        text = take_format("%s%s%s", text, i ? ", " : "", specs->items[i].name);
    return text;
}

static void check_input(const struct spec *spec, const struct array *array) {
    if (dtype_of(spec->dtype) != array->dtype)
        fail(UNUSABLE, "input '%s' has dtype %s; wanted %s: use .astype(numpy.%s)", spec->name,
             dtype_name(array->dtype), spec->dtype, spec->dtype);
    if (!spec_accepts(spec, array->rank, array->shape))
        fail(UNUSABLE, "input '%s' has shape %s; wanted %s", spec->name,
             shape_text(array->rank, array->shape), strrchr(spec_text(spec), '['));
    if (!array->count)
        fail(UNUSABLE, "input '%s' is empty: shape %s", spec->name,
             shape_text(array->rank, array->shape));
}

void session_fit(struct session *session, const struct arrays *inputs) {
    size_t count = session->inputs.count;
    if (inputs->count != count)
        fail(UNUSABLE, "the inputs are named %s; wanted: %s", names_of(inputs),
             spec_names(&session->inputs));
    void *mark = memory_mark();
    int64_t(*shapes)[MAX_RANK] = take_array(count, sizeof *shapes);
    bool same = session->binding;
    for (size_t i = 0; i < count; i++) {
        const struct spec *spec = &session->inputs.items[session->input_of[i]];
        const struct array *given = arrays_find(inputs, spec->name);
        if (!given)
            fail(UNUSABLE, "the inputs are named %s; wanted: %s", names_of(inputs),
                 spec_names(&session->inputs));
        check_input(spec, given);
        memcpy(shapes[i], given->shape, given->rank * sizeof **shapes);
        same = same && !memcmp(session->binding->inputs.items[i].shape, shapes[i],
                               given->rank * sizeof **shapes);
    }
    if (same) {
        memory_release(mark);
        return;
    }
    if (session->binding)
        engine_unbind(session->engine, session->binding);
    session->binding = NULL;
    session->binding = engine_bind(session->engine, shapes);
}

void session_fill(struct session *session, const struct arrays *inputs) {
    for (size_t i = 0; i < session->inputs.count; i++) {
        struct array *buffer = &session->binding->inputs.items[i];
        const struct array *given =
            arrays_find(inputs, session->inputs.items[session->input_of[i]].name);
        memcpy(buffer->data, given->data, buffer->bytes);
    }
}

void session_invoke(struct session *session) { engine_run(session->engine, session->binding); }

static void name_results(struct session *session) {
    for (size_t i = 0; i < session->results.count; i++) {
        size_t ours = session->output_of[i];
        session->results.items[ours] = session->binding->outputs.items[i];
        session->results.items[ours].name = session->outputs.items[ours].name;
    }
}

const struct arrays *session_run(struct session *session, const struct arrays *inputs) {
    session_fit(session, inputs);
    session_fill(session, inputs);
    session_invoke(session);
    name_results(session);
    return &session->results;
}

// xorshift64* (Vigna 2016): noise that is the same everywhere
static double noise(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)(*state * UINT64_C(0x2545f4914f6cdd1d) >> 11) * 0x1p-53;
}

struct arrays session_noise(const struct session *session) {
    struct arrays made = {session->inputs.count,
                          take_array(session->inputs.count, sizeof(struct array))};
    uint64_t state = 1;
    for (size_t i = 0; i < made.count; i++) {
        const struct spec *spec = &session->inputs.items[i];
        int64_t shape[MAX_RANK];
        enum dtype dtype = dtype_of(spec->dtype);
        if (!dtype)
            fail(NO_TOOL, "input '%s' takes %s; this runner knows only numbers", spec->name, spec->dtype);
        spec_usual_shape(spec, shape);
        made.items[i] = array_make(spec->name, dtype, spec->rank, shape);
        double low = spec->has_range ? spec->low : 0, high = spec->has_range ? spec->high : 1;
        bool whole = !dtype_is_float(dtype);
        for (size_t n = 0; n < made.items[i].count; n++) {
            double value = low + noise(&state) * (high - low + (whole ? 1 : 0));
            array_set(&made.items[i], n, whole ? fmin(floor(value), high) : value);
        }
    }
    return made;
}
