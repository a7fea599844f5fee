#include "array.h"

#include <math.h>
#include <string.h>

#include "fail.h"
#include "memory.h"

static const struct {
    const char *name, *code; // numpy's
    size_t size;
} DTYPES[] = {
    [NO_DTYPE] = {"", "", 0},           [FLOAT16] = {"float16", "f2", 2},
    [FLOAT32] = {"float32", "f4", 4},   [FLOAT64] = {"float64", "f8", 8},
    [INT8] = {"int8", "i1", 1},         [UINT8] = {"uint8", "u1", 1},
    [INT16] = {"int16", "i2", 2},       [UINT16] = {"uint16", "u2", 2},
    [INT32] = {"int32", "i4", 4},       [UINT32] = {"uint32", "u4", 4},
    [INT64] = {"int64", "i8", 8},       [UINT64] = {"uint64", "u8", 8},
    [BOOL] = {"bool", "b1", 1},
};
enum { DTYPE_COUNT = sizeof DTYPES / sizeof *DTYPES };
static const uint64_t MAX_ARRAY = (uint64_t)1 << 31; // bytes

enum dtype dtype_of(const char *name) {
    for (int i = 1; i < DTYPE_COUNT; i++)
        if (!strcmp(DTYPES[i].name, name))
            return (enum dtype)i;
    return NO_DTYPE;
}

const char *dtype_name(enum dtype dtype) { return DTYPES[dtype].name; }
size_t dtype_size(enum dtype dtype) { return DTYPES[dtype].size; }
bool dtype_is_float(enum dtype dtype) { return dtype >= FLOAT16 && dtype <= FLOAT64; }

// Values of a shape, or a failure where there are too many.
static size_t count_of(enum dtype dtype, size_t rank, const int64_t *shape) {
    uint64_t count = 1, most = MAX_ARRAY / dtype_size(dtype);
    for (size_t i = 0; i < rank; i++) {
        if (shape[i] < 0 || (uint64_t)shape[i] > most || (shape[i] && count > most / (uint64_t)shape[i]))
            fail(UNUSABLE, "an array of the shape %s is too large", shape_text(rank, shape));
        count *= (uint64_t)shape[i];
    }
    return count;
}

struct array array_make(const char *name, enum dtype dtype, size_t rank, const int64_t *shape) {
    struct array made = {.name = name, .dtype = dtype, .rank = rank};
    made.count = count_of(dtype, rank, shape);
    made.bytes = made.count * dtype_size(dtype);
    if (rank)
        memcpy(made.shape, shape, rank * sizeof *shape);
    made.data = take(made.bytes);
    return made;
}

// IEEE 754 binary16
static double from_half(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                   : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                  : ldexp(fraction, -24);
    return bits >> 15 ? -value : value;
}

static uint16_t to_half(double value) {
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    double size = fabs(value);
    if (isnan(value))
        return 0x7e00;
    if (size >= 65520)
        return sign | 0x7c00;
    int exponent;
    frexp(size, &exponent);
    if (size < 0x1p-14) // subnormal, or up to the smallest normal
        return sign | (uint16_t)rint(size * 0x1p24);
    return (uint16_t)(sign + (uint16_t)((exponent + 14) << 10) +
                      (uint16_t)(rint(ldexp(size, 11 - exponent)) - 1024));
}

double array_get(const struct array *array, size_t i) {
    const void *data = array->data;
    switch (array->dtype) {
    case FLOAT16: return from_half(((const uint16_t *)data)[i]);
    case FLOAT32: return (double)((const float *)data)[i];
    case FLOAT64: return ((const double *)data)[i];
    case INT8: return ((const int8_t *)data)[i];
    case UINT8:
    case BOOL: return ((const uint8_t *)data)[i];
    case INT16: return ((const int16_t *)data)[i];
    case UINT16: return ((const uint16_t *)data)[i];
    case INT32: return ((const int32_t *)data)[i];
    case UINT32: return ((const uint32_t *)data)[i];
    case INT64: return (double)((const int64_t *)data)[i];
    case UINT64: return (double)((const uint64_t *)data)[i];
    default: return NAN;
    }
}

// A number that an integer of these limits can hold: the nearest, 0 for none.
static double within(double value, double low, double high) {
    return isnan(value) ? 0 : fmin(fmax(value, low), high);
}

void array_set(struct array *array, size_t i, double value) {
    void *data = array->data;
    switch (array->dtype) {
    case FLOAT16: ((uint16_t *)data)[i] = to_half(value); break;
    case FLOAT32: ((float *)data)[i] = (float)value; break;
    case FLOAT64: ((double *)data)[i] = value; break;
    case INT8: ((int8_t *)data)[i] = (int8_t)within(value, INT8_MIN, INT8_MAX); break;
    case UINT8: ((uint8_t *)data)[i] = (uint8_t)within(value, 0, UINT8_MAX); break;
    case BOOL: ((uint8_t *)data)[i] = value != 0; break;
    case INT16: ((int16_t *)data)[i] = (int16_t)within(value, INT16_MIN, INT16_MAX); break;
    case UINT16: ((uint16_t *)data)[i] = (uint16_t)within(value, 0, UINT16_MAX); break;
    case INT32: ((int32_t *)data)[i] = (int32_t)within(value, INT32_MIN, INT32_MAX); break;
    case UINT32: ((uint32_t *)data)[i] = (uint32_t)within(value, 0, UINT32_MAX); break;
    case INT64: ((int64_t *)data)[i] = (int64_t)within(value, -0x1p63, 0x1p63 - 1024); break;
    case UINT64: ((uint64_t *)data)[i] = (uint64_t)within(value, 0, 0x1p64 - 2048); break;
    default: break;
    }
}

struct array *arrays_find(const struct arrays *arrays, const char *name) {
    for (size_t i = 0; i < arrays->count; i++)
        if (!strcmp(arrays->items[i].name, name))
            return &arrays->items[i];
    return NULL;
}

char *shape_text(size_t rank, const int64_t *shape) {
    char *text = "[";
    for (size_t i = 0; i < rank; i++)
        text = take_format("%s%s%lld", text, i ? ", " : "", (long long)shape[i]);
    return take_format("%s]", text);
}

static size_t to_json(struct text *text, const struct array *array, size_t axis, size_t at) {
    if (axis < array->rank) {
        text_add(text, "[", 1);
        for (int64_t i = 0; i < array->shape[axis]; i++) {
            if (i)
                text_add(text, ", ", 2);
            at = to_json(text, array, axis + 1, at);
        }
        text_add(text, "]", 1);
        return at;
    }
    if (array->dtype == BOOL)
        text_format(text, "%s", ((uint8_t *)array->data)[at] ? "true" : "false");
    else if (array->dtype == UINT64)
        text_format(text, "%llu", (unsigned long long)((uint64_t *)array->data)[at]);
    else if (array->dtype == INT64)
        text_format(text, "%lld", (long long)((int64_t *)array->data)[at]);
    else if (dtype_is_float(array->dtype))
        text_json_number(text, array_get(array, at));
    else
        text_format(text, "%.0f", array_get(array, at));
    return at + 1;
}

void array_to_json(struct text *text, const struct array *array) { to_json(text, array, 0, 0); }

// --- numpy's files ------------------------------------------------------------------------------

static const char *after(const char *header, const char *key) {
    const char *found = strstr(header, key);
    if (!found)
        fail(UNUSABLE, "an .npy without %s", key);
    found += strlen(key);
    return found + strspn(found, ": ");
}

static enum dtype coded(const char *code) {
    for (int i = 1; i < DTYPE_COUNT; i++)
        if ((*code == '<' || *code == '|') && !strncmp(code + 1, DTYPES[i].code, 2) && code[3] == '\'')
            return (enum dtype)i;
    fail(UNUSABLE, "an .npy of the type %.8s; wanted numbers, little-endian", code);
}

static size_t read_shape(const char *text, int64_t *shape) {
    size_t rank = 0;
    if (*text++ != '(')
        fail(UNUSABLE, "an .npy without a shape");
    for (;;) {
        text += strspn(text, ", ");
        if (*text == ')')
            return rank;
        int64_t size = 0;
        size_t digits = strspn(text, "0123456789");
        if (!digits || digits > 12 || rank == MAX_RANK)
            fail(UNUSABLE, "an .npy with an unusable shape");
        while (digits--)
            size = size * 10 + (*text++ - '0');
        shape[rank++] = size;
    }
}

// From column-major to row-major order.
static void reorder(struct array *array, const unsigned char *source) {
    size_t width = dtype_size(array->dtype), strides[MAX_RANK], stride = 1;
    int64_t index[MAX_RANK] = {0};
    for (size_t d = 0; d < array->rank; d++) {
        strides[d] = stride;
        stride *= (size_t)array->shape[d];
    }
    for (size_t i = 0; i < array->count; i++) {
        size_t at = 0;
        for (size_t d = 0; d < array->rank; d++)
            at += (size_t)index[d] * strides[d];
        memcpy((char *)array->data + i * width, source + at * width, width);
        for (size_t d = array->rank; d-- > 0;) {
            if (++index[d] < array->shape[d])
                break;
            index[d] = 0;
        }
    }
}

struct array npy_parse(const char *name, const unsigned char *bytes, size_t size) {
    if (size < 12 || memcmp(bytes, "\x93NUMPY", 6) || bytes[6] < 1 || bytes[6] > 3)
        fail(UNUSABLE, "%s is no .npy", name);
    size_t start = bytes[6] == 1 ? 10 : 12;
    size_t length = bytes[6] == 1 ? little16(bytes + 8) : little32(bytes + 8);
    if (length > size - start || length > 65536)
        fail(UNUSABLE, "%s is damaged: its header ends early", name);
    char *header = take_text((const char *)bytes + start, length);
    int64_t shape[MAX_RANK];
    const char *code = after(header, "'descr'");
    size_t rank = read_shape(after(header, "'shape'"), shape);
    bool columns = !strncmp(after(header, "'fortran_order'"), "True", 4);
    if (*code++ != '\'')
        fail(UNUSABLE, "%s holds records; wanted plain numbers", name);
    enum dtype dtype = coded(code);
    if (count_of(dtype, rank, shape) * dtype_size(dtype) != size - start - length)
        fail(UNUSABLE, "%s has %zu bytes of data for the shape %s", name, size - start - length,
             shape_text(rank, shape));
    struct array found = array_make(name, dtype, rank, shape);
    if (columns)
        reorder(&found, bytes + start + length);
    else if (found.bytes)
        memcpy(found.data, bytes + start + length, found.bytes);
    return found;
}

enum { LOCAL = 30, CENTRAL = 46, END = 22, MAX_ARRAYS = 4096 };

static struct array read_member(const struct file *file, const unsigned char *p, size_t left,
                                size_t *taken) {
    unsigned char local[LOCAL];
    if (left < CENTRAL || memcmp(p, "PK\1\2", 4))
        fail(UNUSABLE, "%s: the archive is damaged", file->name);
    size_t named = little16(p + 28), extra = little16(p + 30), comment = little16(p + 32);
    uint32_t size = little32(p + 24), offset = little32(p + 42);
    if (left - CENTRAL < named + extra + comment)
        fail(UNUSABLE, "%s: the archive is damaged", file->name);
    if (little16(p + 10) || little32(p + 20) != size)
        fail(UNUSABLE, "%s: it is compressed; wanted numpy.savez", file->name);
    if (size == UINT32_MAX || offset == UINT32_MAX)
        fail(UNUSABLE, "%s: an array of more than 4 GB", file->name);
    *taken = CENTRAL + named + extra + comment;
    file_read(file, offset, local, LOCAL);
    if (memcmp(local, "PK\3\4", 4))
        fail(UNUSABLE, "%s: the archive is damaged", file->name);
    uint64_t at = (uint64_t)offset + LOCAL + little16(local + 26) + little16(local + 28);
    char *name = take_text((const char *)p + CENTRAL, named);
    if (named > 4 && !strcmp(name + named - 4, ".npy"))
        name[named - 4] = 0;
    if (size > file->size)
        fail(UNUSABLE, "%s: '%s' is said to be larger than the file", file->name, name);
    unsigned char *bytes = take(size + (size_t)1);
    file_read(file, at, bytes, size);
    if (crc32_of(bytes, size) != little32(p + 16))
        fail(UNUSABLE, "%s: '%s' is damaged: its checksum differs", file->name, name);
    return npy_parse(name, bytes, size);
}

struct arrays npz_parse(const struct file *file) {
    unsigned char end[END];
    if (file->size < END)
        fail(UNUSABLE, "%s is no .npz", file->name);
    file_read(file, file->size - END, end, END);
    uint32_t count = little16(end + 10), length = little32(end + 12), start = little32(end + 16);
    if (memcmp(end, "PK\5\6", 4) || (uint64_t)start + length + END > file->size)
        fail(UNUSABLE, "%s is no .npz, or is cut off", file->name);
    if (count > MAX_ARRAYS || length > (1u << 24))
        fail(UNUSABLE, "%s holds %u arrays, at most %d are allowed", file->name, count, MAX_ARRAYS);
    unsigned char *directory = take(length + (size_t)1);
    file_read(file, start, directory, length);
    struct arrays found = {0, take_array(count, sizeof(struct array))};
    size_t at = 0, taken;
    for (uint32_t i = 0; i < count; i++) {
        struct array one = read_member(file, directory + at, length - at, &taken);
        if (arrays_find(&found, one.name))
            fail(UNUSABLE, "%s holds '%s' twice", file->name, one.name);
        found.items[found.count++] = one;
        at += taken;
    }
    return found;
}

static void add16(struct text *out, uint32_t value) {
    text_add(out, (char[]){(char)value, (char)(value >> 8)}, 2);
}

static void add32(struct text *out, uint32_t value) {
    add16(out, value & 0xffff);
    add16(out, value >> 16);
}

static void add_facts(struct text *out, const char *name, const struct text *body) {
    add16(out, 20);
    add32(out, 0); // flags and method
    add16(out, 0);
    add16(out, 0x21);
    add32(out, crc32_of(body->bytes, body->length));
    add32(out, (uint32_t)body->length);
    add32(out, (uint32_t)body->length);
    add16(out, (uint32_t)strlen(name));
    add16(out, 0);
}

static struct text npy_text(const struct array *array) {
    struct text header = {0}, out = {0};
    size_t size = dtype_size(array->dtype);
    text_format(&header, "{'descr': '%c%s', 'fortran_order': False, 'shape': (",
                size == 1 ? '|' : '<', DTYPES[array->dtype].code);
    for (size_t i = 0; i < array->rank; i++)
        text_format(&header, "%lld,%s", (long long)array->shape[i], i + 1 < array->rank ? " " : "");
    text_format(&header, "), }");
    while ((10 + header.length + 1) % 64)
        text_add(&header, " ", 1);
    text_add(&header, "\n", 1);
    text_add(&out, "\x93NUMPY\1\0", 8);
    add16(&out, (uint32_t)header.length);
    text_add(&out, header.bytes, header.length);
    text_add(&out, array->data, array->bytes);
    return out;
}

void npz_write(const char *path, const struct arrays *arrays) {
    struct text out = {0}, directory = {0};
    for (size_t i = 0; i < arrays->count; i++) {
        char *name = take_format("%s.npy", arrays->items[i].name);
        struct text body = npy_text(&arrays->items[i]);
        uint32_t offset = (uint32_t)out.length;
        text_add(&out, "PK\3\4", 4);
        add_facts(&out, name, &body);
        text_add(&out, name, strlen(name));
        text_add(&out, body.bytes, body.length);
        text_add(&directory, "PK\1\2\24\3", 6);
        add_facts(&directory, name, &body);
        text_add(&directory, "\0\0\0\0\0", 6);
        add32(&directory, (uint32_t)0100644 << 16);
        add32(&directory, offset);
        text_add(&directory, name, strlen(name));
    }
    uint32_t start = (uint32_t)out.length;
    if (out.length > UINT32_MAX || arrays->count > MAX_ARRAYS)
        fail(UNUSABLE, "%s would have %zu MB; an .npz has at most 4 GB", path, out.length >> 20);
    text_add(&out, directory.bytes ? directory.bytes : "", directory.length);
    text_add(&out, "PK\5\6\0\0\0\0", 8);
    add16(&out, (uint32_t)arrays->count);
    add16(&out, (uint32_t)arrays->count);
    add32(&out, (uint32_t)directory.length);
    add32(&out, start);
    add16(&out, 0);
    file_replace(path, out.bytes, out.length, false);
}
