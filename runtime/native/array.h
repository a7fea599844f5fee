// Arrays of numbers, C order, and the files numpy keeps them in.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "file.h"
#include "manifest.h"
#include "text.h"

enum dtype { NO_DTYPE, FLOAT16, FLOAT32, FLOAT64, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64,
             UINT64, BOOL };

struct array {
    const char *name;
    enum dtype dtype;
    size_t rank;
    int64_t shape[MAX_RANK];
    size_t count, bytes; // of values; of all of them
    void *data;
};

struct arrays {
    size_t count;
    struct array *items;
};

enum dtype dtype_of(const char *name); // numpy's name; NO_DTYPE for others
const char *dtype_name(enum dtype dtype);
size_t dtype_size(enum dtype dtype);
bool dtype_is_float(enum dtype dtype);

// Zeroed. Fails with UNUSABLE where it would be larger than memory allows.
struct array array_make(const char *name, enum dtype dtype, size_t rank, const int64_t *shape);
double array_get(const struct array *array, size_t index);
void array_set(struct array *array, size_t index, double value);
struct array *arrays_find(const struct arrays *arrays, const char *name); // NULL without
// `[1, 3]`
char *shape_text(size_t rank, const int64_t *shape);
// Nested lists; null for what JSON has no number for.
void array_to_json(struct text *text, const struct array *array);

// `.npy` and stored `.npz`, little-endian numbers. Fail with UNUSABLE.
struct array npy_parse(const char *name, const unsigned char *bytes, size_t size);
struct arrays npz_parse(const struct file *file);
void npz_write(const char *path, const struct arrays *arrays);
