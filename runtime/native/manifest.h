// The bundle's manifest: every type checked, unknown keys and schema versions refused.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "json.h"

enum { MAX_RANK = 32 };

struct dimension {
    int64_t size;     // 0: free
    const char *name; // of a free one
};

struct spec {
    const char *name, *dtype, *layout;
    size_t rank;
    struct dimension shape[MAX_RANK];
    bool has_range, has_example;
    double low, high;
    int64_t example[MAX_RANK];
};

struct specs {
    size_t count;
    struct spec *items;
};

struct names {
    size_t count;
    const char **items;
};

struct file_entry {
    const char *path, *sha256;
    uint64_t size;
    uint32_t crc32;
    const char *packed_sha256; // of what lies in the archive where that is compressed, else NULL
    uint64_t packed_size;      // there
};

struct tolerance {
    const char *output;
    double atol, rtol;
};

struct share { // of the operators, by device
    const char *device;
    double share;
};

struct variant {
    const char *id, *engine, *format, *scheme, *precision, *on_misplacement;
    struct names files, input_names, output_names, machines;
    int64_t threads, memory_bytes; // memory_bytes: -1 if unknown
    size_t shares;
    struct share *placement;
    const struct json *expected; // NULL without
    const char *golden_inputs, *golden_outputs;
    int64_t golden_samples;
    size_t tolerances;
    struct tolerance *tolerance;
};

struct manifest {
    const char *bundle_id, *sequence, *name, *created;
    struct names profiles, labels;
    bool has_labels;
    struct specs inputs, outputs;
    size_t variants, files;
    struct variant *variant;
    struct file_entry *file;
    const struct json *states, *preprocess, *postprocess; // NULL without
};

// Fails with UNUSABLE.
struct manifest *manifest_parse(const char *bytes, size_t size);
// Of that id, or the first; fails with UNUSABLE.
struct variant *manifest_variant(struct manifest *manifest, const char *id);
// Whether two models take and give arrays of the same names, dtypes and shapes.
bool same_interface(const struct manifest *one, const struct manifest *other);
// Whether an array of this shape fits; free dimensions of one name must agree.
bool spec_accepts(const struct spec *spec, size_t rank, const int64_t *shape);
// The shape seen in real data, or 1 for every free dimension.
void spec_usual_shape(const struct spec *spec, int64_t *shape);
// `x: float32 [1, n]`
char *spec_text(const struct spec *spec);
