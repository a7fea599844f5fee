// The trial of a bundle on the device it is to serve: `edgekit_runtime.acceptance`.
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "fail.h"
#include "golden.h"
#include "machine.h"
#include "memory.h"
#include "verbs.h"

enum { RUNS = 20 };
static const int64_t SECONDS_NS = 3000000000;
// `memory_bytes` was measured of a whole process on another machine, with other page sizes
static const double MEMORY_SLACK = 1.5;

static bool is_sound(const char *path, struct bundle **bundle) {
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here))
        return false;
    *bundle = bundle_open(path);
    trap_close(&trap);
    return true;
}

// Programs in the field would stumble over another interface. What is damaged has none.
static void check_interface(const struct manifest *manifest, const char *active) {
    struct bundle *old;
    if (!active || !is_sound(active, &old))
        return;
    bool same = same_interface(manifest, old->manifest);
    bundle_close(old);
    if (!same)
        fail(UNUSABLE, "it has other inputs or outputs than the version that is active; install it "
             "under another name");
}

static void check_golden(struct session *session) {
    struct golden *results = golden_check(session);
    for (size_t i = 0; i < session->outputs.count; i++)
        if (!results[i].ok)
            fail(LIMIT, "golden output '%s': %s", results[i].output,
                 *results[i].note ? results[i].note
                                  : take_format("off by %.3g times what is allowed", results[i].worst));
}

static size_t time_it(struct session *session, int64_t *samples) {
    struct arrays inputs = session_noise(session);
    int64_t once = 1;
    for (int i = 0; i < 2; i++) {
        int64_t start = clock_ns();
        session_run(session, &inputs);
        once = clock_ns() - start;
    }
    int64_t fit = SECONDS_NS / (once > 1 ? once : 1);
    size_t count = fit < 3 ? 3 : fit > RUNS ? RUNS : (size_t)fit;
    for (size_t i = 0; i < count; i++) {
        int64_t start = clock_ns();
        session_run(session, &inputs);
        samples[i] = clock_ns() - start;
    }
    return count;
}

// The bundle's limit in nanoseconds, or NAN; `other` says on what it was measured, if not here.
static double promised(const struct variant *variant, const char **other) {
    const struct json *limits = variant->expected ? json_get(variant->expected, "limits") : NULL;
    double limit = limits ? json_number_or(limits, "latency_ns", NAN) : NAN;
    if (!(limit > 0))
        return NAN;
    const char *arch = json_text_or(limits, "arch", NULL), *cpu = json_text_or(limits, "cpu", NULL);
    const char *here = machine_cpu_name();
    if (cpu && (!here || strcmp(cpu, here)))
        *other = take_format("%.80s", cpu);
    if (arch && strcmp(arch, machine_name()))
        *other = take_format("%.80s%s%s", arch, *other ? ", " : "", *other ? *other : "");
    return *other ? NAN : limit;
}

static void check_latency(int64_t p50, double limit, const char *of) {
    if (limit > 0 && (double)p50 > limit)
        fail(LIMIT, "p50 is %.2f ms, %s is %.2f ms", (double)p50 / 1e6, of, limit / 1e6);
}

static void accept(const struct arguments *given, struct text *answer) {
    int64_t samples[RUNS], before = machine_rss_bytes();
    const char *other = NULL;
    struct bundle *bundle = bundle_open(given->model);
    if (given->active) {
        bundle_verify(bundle); // what is damaged has no interface to speak of
        check_interface(bundle->manifest, given->active);
    }
    struct session *session = session_of(bundle, &given->options);
    check_golden(session);
    size_t count = time_it(session, samples);
    int64_t grown = machine_peak_rss_bytes() - before, p50 = percentile_ns(samples, count, 50);
    check_latency(p50, (double)given->max_latency_ns, "--max-latency");
    check_latency(p50, promised(session->variant, &other), "the bundle's limit");
    int64_t wanted = session->variant->memory_bytes;
    if (wanted >= 0 && (double)grown > MEMORY_SLACK * (double)wanted)
        fail(LIMIT, "it takes %.0f MB of memory, the bundle says %.0f MB", (double)grown / 1e6,
             (double)wanted / 1e6);
    text_format(answer, "{\"ok\": true");
    text_json_member(answer, "variant", session->variant->id);
    text_json_key(answer, "latency_ns");
    summary_to_json(answer, samples, count);
    text_json_member_integer(answer, "memory_bytes", grown);
    text_json_member(answer, "placement", engine_placement(session->engine));
    if (other)
        text_json_member(answer, "unused_limits", take_format("latency: measured on %s", other));
    if (*session->passed_over)
        text_json_member(answer, "passed_over", session->passed_over);
    text_add(answer, "}", 1);
    session_close(session);
}

static int refuse(const struct fault *fault, const char *path) {
    struct text answer = {0};
    const char *why = fault->text, *prefix = take_format("%s: ", path);
    if (!strncmp(why, prefix, strlen(prefix)))
        why += strlen(prefix);
    text_format(&answer, "{\"ok\": false");
    text_json_member(&answer, "why", why);
    text_json_member_integer(&answer, "code", fault->code);
    text_add(&answer, "}", 1);
    puts(answer.bytes);
    return LIMIT;
}

int verb_trial(const struct arguments *given) {
    struct trap trap;
    if (given->timeout_s > 0)
        alarm((unsigned)given->timeout_s); // whoever started it may be gone by then
    trap_open(&trap);
    if (setjmp(trap.here))
        return refuse(&trap.fault, given->model);
    struct text answer = {0};
    accept(given, &answer);
    trap_close(&trap);
    puts(answer.bytes);
    return 0;
}
