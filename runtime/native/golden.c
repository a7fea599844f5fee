#include "golden.h"

#include <math.h>
#include <string.h>

#include "fail.h"
#include "memory.h"
#include "steps.h"

static struct arrays read_arrays(struct session *session, const char *path) {
    size_t size;
    unsigned char *bytes = bundle_read(session->bundle, path, &size);
    struct file file = file_in_memory("a golden file is unreadable", bytes, size);
    struct arrays found = npz_parse(&file);
    for (size_t i = 0; i < found.count; i++) {
        const struct array *one = &found.items[i];
        if (!one->rank || one->shape[0] != session->variant->golden_samples)
            fail(UNUSABLE, "%s: a golden array has the shape %s; wanted %lld samples",
                 session->bundle->path, shape_text(one->rank, one->shape),
                 (long long)session->variant->golden_samples);
    }
    return found;
}

// One sample: without the first axis, over the same memory.
static struct array sample_of(const struct array *all, int64_t number) {
    struct array one = *all;
    one.rank--;
    memmove(one.shape, all->shape + 1, one.rank * sizeof *one.shape);
    one.count = all->count / (size_t)all->shape[0];
    one.bytes = all->bytes / (size_t)all->shape[0];
    one.data = (char *)all->data + one.bytes * (size_t)number;
    return one;
}

static struct arrays samples_of(const struct arrays *all, int64_t number) {
    struct arrays found = {all->count, take_array(all->count, sizeof(struct array))};
    for (size_t i = 0; i < all->count; i++)
        found.items[i] = sample_of(&all->items[i], number);
    return found;
}

static const struct tolerance *tolerance_of(const struct variant *variant, const char *output) {
    for (size_t i = 0; i < variant->tolerances; i++)
        if (!strcmp(variant->tolerance[i].output, output))
            return &variant->tolerance[i];
    fail(UNUSABLE, "no golden tolerance for '%s'", output);
}

static void failed(struct golden *result, const char *note) {
    result->ok = false;
    result->max_abs = result->worst = INFINITY;
    result->note = note;
}

static void compare(struct golden *result, const struct tolerance *limit, const struct array *got,
                    const struct array *want) {
    if (!result->ok && *result->note)
        return; // it failed before
    bool same = got->rank == want->rank;
    for (size_t i = 0; i < got->rank && same; i++)
        same = got->shape[i] == want->shape[i];
    if (!same) {
        failed(result, take_format("shape %s, wanted %s", shape_text(got->rank, got->shape),
                                   shape_text(want->rank, want->shape)));
        return;
    }
    for (size_t i = 0; i < got->count; i++) {
        double a = array_get(got, i), b = array_get(want, i);
        if (!isfinite(a) || !isfinite(b)) {
            failed(result, "NaN or Inf");
            return;
        }
        double difference = fabs(a - b), allowed = limit->atol + limit->rtol * fabs(b);
        // Where nothing is allowed, 1e-300 makes any difference infinitely too large.
        result->worst = fmax(result->worst, difference / fmax(allowed, 1e-300));
        result->max_abs = fmax(result->max_abs, difference);
    }
    result->ok = result->worst <= 1;
}

// What the bundle makes of an answer works, too; steps that are not here do not count.
static void try_postprocess(struct session *session, const struct arrays *outputs) {
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        if (trap.fault.code != NO_TOOL)
            fail_again(&trap.fault);
        return;
    }
    struct text answer = {0};
    postprocess(session, outputs, &answer);
    trap_close(&trap);
}

struct golden *golden_check(struct session *session) {
    const struct variant *variant = session->variant;
    struct arrays inputs = read_arrays(session, variant->golden_inputs);
    struct arrays wanted = read_arrays(session, variant->golden_outputs);
    if (wanted.count != session->outputs.count || !inputs.count)
        fail(UNUSABLE, "%s: there are golden outputs for %zu of %zu outputs", session->bundle->path,
             wanted.count, session->outputs.count);
    struct golden *results = take_array(session->outputs.count, sizeof *results);
    for (size_t i = 0; i < session->outputs.count; i++)
        results[i] = (struct golden){session->outputs.items[i].name, true, 0, 0,
                                     variant->golden_samples, ""};
    for (int64_t number = 0; number < variant->golden_samples; number++) {
        struct arrays sample = samples_of(&inputs, number);
        const struct arrays *got = session_run(session, &sample);
        for (size_t i = 0; i < session->outputs.count; i++) {
            const struct array *all = arrays_find(&wanted, results[i].output);
            if (!all)
                fail(UNUSABLE, "%s: no golden output '%s'", session->bundle->path, results[i].output);
            struct array want = sample_of(all, number);
            compare(&results[i], tolerance_of(variant, results[i].output), &got->items[i], &want);
        }
    }
    struct arrays first = samples_of(&wanted, 0);
    try_postprocess(session, &first);
    return results;
}
