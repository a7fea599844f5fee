#include "verbs.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "fail.h"
#include "golden.h"
#include "machine.h"
#include "memory.h"
#include "samples.h"
#include "steps.h"

static void print_line(struct text *text) {
    text_add(text, "\n", 1);
    fwrite(text->bytes, 1, text->length, stdout);
}

int verb_run(const struct arguments *given) {
    struct session *session = session_open(given->model, &given->options);
    struct arrays inputs = sample_from(session, given->inputs, given->input_count, given->tensors);
    const struct arrays *outputs = session_run(session, &inputs);
    struct text answer = {0};
    text_format(&answer, "{\"schema\": \"edgekit.run/1\", \"outputs\": {");
    postprocess(session, outputs, &answer);
    text_add(&answer, "}}", 2);
    if (given->output)
        npz_write(given->output, outputs);
    if (given->json || !given->output)
        print_line(&answer);
    session_close(session);
    return 0;
}

int verb_check(const struct arguments *given) {
    if (!is_bundle(given->model))
        fail(UNUSABLE, "%s is a plain model; only bundles have golden outputs", given->model);
    if (given->options.engine)
        fail(UNUSABLE, "--engine is for plain models; choose one of the bundle's variants");
    struct session *session = session_open(given->model, &given->options);
    struct golden *results = golden_check(session);
    bool ok = true;
    struct text answer = {0};
    for (size_t i = 0; i < session->outputs.count; i++)
        ok &= results[i].ok;
    text_format(&answer, "{\"schema\": \"edgekit.check/1\", \"ok\": %s, \"outputs\": [", ok ? "true" : "false");
    for (size_t i = 0; i < session->outputs.count; i++) {
        const struct golden *one = &results[i];
        text_json_key(&answer, NULL);
        text_add(&answer, "{", 1);
        text_json_member(&answer, "output", one->output);
        text_json_member_truth(&answer, "ok", one->ok);
        text_json_member_number(&answer, "max_abs", one->max_abs);
        text_json_member_number(&answer, "worst", one->worst);
        text_json_member_integer(&answer, "samples", one->samples);
        text_json_member(&answer, "note", one->note);
        text_add(&answer, "}", 1);
        if (!given->json)
            printf("%s: %s%s (largest difference %.3g, %.3g %% of what is allowed, %lld samples)\n",
                   one->output, one->ok ? "ok" : "DIFFERS ", one->note, one->max_abs,
                   100 * one->worst, (long long)one->samples);
    }
    text_add(&answer, "]}", 2);
    if (given->json)
        print_line(&answer);
    session_close(session);
    return ok ? 0 : LIMIT;
}

struct parts {
    int64_t *total, *pre, *infer, *post;
};

static void time_runs(struct session *session, const struct arrays *samples, size_t count,
                      struct parts parts, size_t runs, int64_t untimed) {
    for (int64_t i = -untimed; i < (int64_t)runs; i++) {
        const struct arrays *sample = &samples[(size_t)(i + untimed) % count];
        int64_t start = clock_ns();
        session_fit(session, sample);
        session_fill(session, sample);
        int64_t filled = clock_ns();
        session_invoke(session);
        int64_t done = clock_ns();
        if (i < 0)
            continue;
        parts.pre[i] = filled - start;
        parts.infer[i] = done - filled;
        parts.post[i] = clock_ns() - done;
        parts.total[i] = parts.pre[i] + parts.infer[i] + parts.post[i];
    }
}

static int cold_start(const struct arguments *given) {
    struct text answer = {0}, imported = {0}, loaded = {0}, first = {0};
    size_t count;
    int64_t begin = clock_ns();
    machine_memory_to_json(&imported);
    struct session *session = session_open(given->model, &given->options);
    int64_t done = clock_ns();
    machine_memory_to_json(&loaded);
    struct arrays *samples = samples_from(session, given->input, false, &count);
    int64_t start = clock_ns();
    session_run(session, samples);
    int64_t end = clock_ns();
    machine_memory_to_json(&first);
    text_format(&answer, "{\"schema\": \"edgekit.cold/1\"");
    text_json_member_integer(&answer, "import_ns", begin - given->started_ns);
    text_json_member_integer(&answer, "load_ns", done - begin);
    text_json_member_integer(&answer, "first_run_ns", end - start);
    text_format(&answer, ", \"memory_bytes\": {\"import\": %s, \"load\": %s, \"first_run\": %s}",
                imported.bytes, loaded.bytes, first.bytes);
    text_json_member_integer(&answer, "peak_rss_bytes", machine_peak_rss_bytes());
    text_add(&answer, "}", 1);
    print_line(&answer);
    return 0;
}

int verb_bench(const struct arguments *given) {
    size_t count, runs = (size_t)given->runs;
    if (given->cold)
        return cold_start(given);
    struct session *session = session_open(given->model, &given->options);
    bool raw = given->input && !given->tensors && session->manifest && session->manifest->preprocess &&
               session->manifest->preprocess->length;
    struct arrays *samples = samples_from(session, given->input, raw, &count);
    struct parts parts = {take_array(runs, 8), take_array(runs, 8), take_array(runs, 8), take_array(runs, 8)};
    struct reading before = machine_read();
    time_runs(session, samples, count, parts, runs, given->runs < 30 ? 3 : given->runs / 10);
    struct reading after = machine_read();
    struct text answer = {0};
    text_format(&answer, "{\"schema\": \"edgekit.bench/1\", \"latency_ns\": ");
    summary_to_json(&answer, parts.total, runs);
    text_json_key(&answer, "samples_ns");
    samples_to_json(&answer, parts.total, runs);
    text_json_key(&answer, "parts_ns");
    text_add(&answer, "{", 1);
    text_json_key(&answer, "pre");
    summary_to_json(&answer, parts.pre, runs);
    text_json_key(&answer, "infer");
    summary_to_json(&answer, parts.infer, runs);
    text_json_key(&answer, "post");
    summary_to_json(&answer, parts.post, runs);
    text_add(&answer, "}", 1);
    text_json_member(&answer, "placement", engine_placement(session->engine));
    text_json_member_integer(&answer, "peak_rss_bytes", machine_peak_rss_bytes());
    machine_to_json(&answer, &before, &after);
    text_add(&answer, "}", 1);
    if (given->json)
        print_line(&answer);
    else
        printf("p50 %.3f ms  min %.3f ms  (%zu runs, measured here; %s)\n",
               (double)percentile_ns(parts.total, runs, 50) / 1e6,
               (double)percentile_ns(parts.total, runs, 0) / 1e6, runs, engine_placement(session->engine));
    session_close(session);
    return 0;
}

static void specs_to_json(struct text *text, const char *key, const struct specs *specs) {
    text_json_key(text, key);
    text_add(text, "[", 1);
    for (size_t i = 0; i < specs->count; i++) {
        const struct spec *one = &specs->items[i];
        text_json_key(text, NULL);
        text_add(text, "{", 1);
        text_json_member(text, "name", one->name);
        text_json_member(text, "dtype", one->dtype);
        text_json_key(text, "shape");
        text_add(text, "[", 1);
        for (size_t d = 0; d < one->rank; d++) {
            text_json_key(text, NULL);
            if (one->shape[d].size)
                text_format(text, "%lld", (long long)one->shape[d].size);
            else
                text_json_string(text, one->shape[d].name);
        }
        text_add(text, "]", 1);
        text_json_member(text, "layout", NULL);
        text_json_member(text, "range", NULL);
        text_json_member(text, "example", NULL);
        text_add(text, "}", 1);
    }
    text_add(text, "]", 1);
}

static void print_specs(const struct specs *inputs, const struct specs *outputs) {
    for (size_t i = 0; i < inputs->count; i++)
        printf("input    %s\n", spec_text(&inputs->items[i]));
    for (size_t i = 0; i < outputs->count; i++)
        printf("output   %s\n", spec_text(&outputs->items[i]));
}

static int bundle_info(const struct arguments *given) {
    struct bundle *bundle = bundle_open(given->model);
    struct manifest *manifest = bundle->manifest;
    if (given->json) { // as it is in the bundle: what writes bundles writes what `info` prints
        fwrite(bundle->manifest_text, 1, bundle->manifest_size, stdout);
        return 0;
    }
    printf("%s  %s  sequence %s\nmade %s\n", manifest->name, manifest->bundle_id, manifest->sequence,
           manifest->created);
    print_specs(&manifest->inputs, &manifest->outputs);
    for (size_t i = 0; i < manifest->variants; i++)
        printf("variant  %s: %s, %s, threads %lld\n", manifest->variant[i].id,
               manifest->variant[i].engine, manifest->variant[i].scheme,
               (long long)manifest->variant[i].threads);
    bundle_close(bundle);
    return 0;
}

int verb_info(const struct arguments *given) {
    if (is_bundle(given->model))
        return bundle_info(given);
    struct session *session = session_open(given->model, &given->options);
    if (given->json) {
        struct text answer = {0};
        text_format(&answer, "{\"schema\": \"edgekit.info/1\"");
        text_json_member(&answer, "placement", engine_placement(session->engine));
        specs_to_json(&answer, "inputs", &session->inputs);
        specs_to_json(&answer, "outputs", &session->outputs);
        text_add(&answer, "}", 1);
        print_line(&answer);
    } else {
        printf("%s  runs on %s, version %s\n", given->model, engine_placement(session->engine),
               engine_version(session->engine));
        print_specs(&session->inputs, &session->outputs);
    }
    session_close(session);
    return 0;
}
