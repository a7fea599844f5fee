#include <math.h>
#include <string.h>

#include "fail.h"
#include "memory.h"
#include "steps.h"

static const double MAX_VALUES = 1 << 26;

// What is known of the sample before a step runs: `edgekit_runtime.steps.Sample`.
struct sample {
    struct array array;
    const char *layout; // "" for none
    int channel_axis;   // from the end, 0: it has to be told
    const char *where;  // for messages
};

static const struct json *option(const struct json *step, const char *name) {
    const struct json *found = json_get(step, name);
    return found && found->kind != J_NULL ? found : NULL;
}

static int64_t integer(const struct json *step, const char *name, int64_t otherwise,
                       int64_t low, int64_t high, const char *where) {
    const struct json *found = option(step, name);
    int64_t value = found ? found->integer : otherwise;
    if (found ? found->kind != J_INT || !found->fits : otherwise < low)
        fail(UNUSABLE, "%s has no usable %s; wanted an integer", where, name);
    if (value < low || value > high)
        fail(UNUSABLE, "%s has %s = %lld; wanted %lld to %lld", where, name, (long long)value,
             (long long)low, (long long)high);
    return value;
}

static double number(const struct json *value, const char *name, const char *where) {
    if ((value->kind != J_INT && value->kind != J_FLOAT) || !(fabs(value->number) <= 3.4028234663852886e38))
        fail(UNUSABLE, "%s has no usable %s; wanted a finite number", where, name);
    return value->number;
}

static const char *word(const struct json *step, const char *name, const char *otherwise,
                        const char *where) {
    const struct json *found = option(step, name);
    if (found ? found->kind != J_TEXT : !otherwise)
        fail(UNUSABLE, "%s has no usable %s", where, name);
    return found ? found->text : otherwise;
}

static size_t axis_of(const struct array *x, int64_t axis, const char *where) {
    if (axis < -(int64_t)x->rank || axis >= (int64_t)x->rank)
        fail(UNUSABLE, "%s has axis = %lld, got the shape %s", where, (long long)axis,
             shape_text(x->rank, x->shape));
    return (size_t)(axis < 0 ? axis + (int64_t)x->rank : axis);
}

// Values before, along and after an axis.
static void split(const struct array *x, size_t axis, size_t *outer, size_t *along, size_t *inner) {
    *outer = *inner = 1;
    for (size_t i = 0; i < x->rank; i++)
        *(i < axis ? outer : i > axis ? inner : along) =
            i == axis ? (size_t)x->shape[i]
                      : *(i < axis ? outer : inner) * (size_t)x->shape[i];
}

static struct array as_float(const struct array *x) {
    struct array y = array_make(x->name, FLOAT32, x->rank, x->shape);
    for (size_t i = 0; i < x->count; i++)
        ((float *)y.data)[i] = (float)array_get(x, i);
    return y;
}

// y = (x * scale - mean) / std in float32, numbers or lists over the channels
static void apply(struct sample *sample, const struct json *values, const char *name, int64_t axis,
                  bool told) {
    struct array *y = &sample->array;
    size_t outer = 1, along = 1, inner = y->count;
    const struct json *items = values;
    size_t count = 1;
    if (values->kind == J_LIST) {
        if (!told && !sample->channel_axis)
            fail(UNUSABLE, "%s has a list; after reshape or expand it needs axis", sample->where);
        split(y, axis_of(y, axis, sample->where), &outer, &along, &inner);
        items = values->items;
        count = values->length;
        if (count != along)
            fail(UNUSABLE, "%s has a list of %zu, got the shape %s", sample->where, count,
                 shape_text(y->rank, y->shape));
    }
    float *p = y->data;
    for (size_t o = 0; o < outer; o++)
        for (size_t c = 0; c < count; c++) {
            float value = (float)number(&items[c], name, sample->where);
            if (*name == 's' && name[1] == 't' && !(value > 0))
                fail(UNUSABLE, "%s has std = %g; wanted numbers above 0", sample->where, (double)value);
            for (size_t i = 0; i < inner; i++, p++)
                *p = *name == 'm' ? *p - value : name[1] == 't' ? *p / value : *p * value;
        }
}

static void normalize(struct sample *sample, const struct json *step) {
    static const char *const names[] = {"scale", "mean", "std"};
    bool told = option(step, "axis");
    int64_t axis = integer(step, "axis", sample->channel_axis ? sample->channel_axis : -1, -8, 7,
                           sample->where);
    sample->array = as_float(&sample->array);
    for (int i = 0; i < 3; i++)
        if (option(step, names[i]))
            apply(sample, option(step, names[i]), names[i], axis, told);
}

static void range_of(enum dtype dtype, double *low, double *high) {
    int bits = 8 * (int)dtype_size(dtype);
    bool is_signed = dtype == INT8 || dtype == INT16 || dtype == INT32 || dtype == INT64;
    *low = is_signed ? -ldexp(1, bits - 1) : 0;
    *high = ldexp(1, is_signed ? bits - 1 : bits) - 1;
}

static enum dtype wanted_dtype(const struct json *step, const char *otherwise, const char *where) {
    enum dtype dtype = dtype_of(word(step, "dtype", otherwise, where));
    if (!dtype)
        fail(UNUSABLE, "%s has an unknown dtype", where);
    return dtype;
}

static void cast(struct sample *sample, const struct json *step) {
    enum dtype dtype = wanted_dtype(step, NULL, sample->where);
    struct array *x = &sample->array, y = array_make(x->name, dtype, x->rank, x->shape);
    bool whole = !dtype_is_float(dtype) && dtype != BOOL;
    double low, high;
    range_of(dtype, &low, &high);
    for (size_t i = 0; i < x->count; i++) {
        double value = array_get(x, i);
        if (whole && !(trunc(value) >= low && trunc(value) <= high))
            fail(UNUSABLE, "%s got %g; %s cannot", sample->where, value, dtype_name(dtype));
        array_set(&y, i, whole ? trunc(value) : value);
    }
    *x = y;
}

// round(x / scale) + zero_point in float32, halves to even, saturated
static void quantize(struct sample *sample, const struct json *step) {
    enum dtype dtype = wanted_dtype(step, NULL, sample->where);
    const struct json *given = option(step, "scale");
    float scale = given ? (float)number(given, "scale", sample->where) : 0;
    double low, high;
    range_of(dtype, &low, &high);
    double zero = (double)integer(step, "zero_point", 0, (int64_t)low, (int64_t)high, sample->where);
    if (!(scale > 0) || (dtype != INT8 && dtype != UINT8 && dtype != INT16))
        fail(UNUSABLE, "%s has no usable scale or dtype", sample->where);
    struct array x = as_float(&sample->array), y = array_make(x.name, dtype, x.rank, x.shape);
    for (size_t i = 0; i < x.count; i++) {
        double whole = (double)rintf(((float *)x.data)[i] / scale);
        if (isnan(whole))
            fail(UNUSABLE, "%s got NaN", sample->where);
        array_set(&y, i, fmin(fmax(whole + zero, low), high));
    }
    sample->array = y;
}

// `length` along an axis: filled up or cut off at a side.
static void resize_axis(struct sample *sample, const struct json *step, bool pad) {
    struct array *x = &sample->array;
    int64_t length = integer(step, "length", -1, 1, (int64_t)MAX_VALUES, sample->where);
    size_t axis = axis_of(x, integer(step, "axis", -1, -8, 7, sample->where), sample->where);
    bool right = !strcmp(word(step, "side", "right", sample->where), "right");
    double fill = pad && option(step, "value") ? number(option(step, "value"), "value", sample->where) : 0;
    size_t outer, along, inner, width = dtype_size(x->dtype);
    split(x, axis, &outer, &along, &inner);
    if (pad ? length <= x->shape[axis] : length >= x->shape[axis])
        return;
    if ((double)outer * (double)length * (double)inner > MAX_VALUES)
        fail(UNUSABLE, "%s would make too many values", sample->where);
    int64_t shape[MAX_RANK];
    memcpy(shape, x->shape, sizeof shape);
    shape[axis] = length;
    struct array y = array_make(x->name, x->dtype, x->rank, shape);
    for (size_t i = 0; i < y.count && fill != 0; i++)
        array_set(&y, i, fill);
    size_t kept = pad ? along : (size_t)length;
    size_t from = pad || right ? 0 : along - kept, to = !pad || right ? 0 : (size_t)length - kept;
    for (size_t o = 0; o < outer; o++)
        memcpy((char *)y.data + (o * (size_t)length + to) * inner * width,
               (char *)x->data + (o * along + from) * inner * width, kept * inner * width);
    *x = y;
}

static void reshape(struct sample *sample, const struct json *step) {
    struct array *x = &sample->array;
    const struct json *shape = option(step, "shape");
    size_t known = 1, open = MAX_RANK;
    if (!shape || shape->kind != J_LIST || !shape->length || shape->length > MAX_RANK)
        fail(UNUSABLE, "%s has no usable shape", sample->where);
    for (size_t i = 0; i < shape->length; i++) {
        int64_t size = shape->items[i].kind == J_INT ? shape->items[i].integer : 0;
        if ((size < 1 && size != -1) || size > (int64_t)MAX_VALUES || (size == -1 && open != MAX_RANK))
            fail(UNUSABLE, "%s has no usable shape", sample->where);
        if (size == -1)
            open = i;
        else if (known > (size_t)MAX_VALUES / (size_t)size)
            fail(UNUSABLE, "%s would make too many values", sample->where);
        else
            known *= (size_t)size;
        x->shape[i] = size;
    }
    if (open != MAX_RANK)
        x->shape[open] = (int64_t)(x->count / known);
    if (open != MAX_RANK ? x->count % known : x->count != known)
        fail(UNUSABLE, "%s cannot make that shape of %zu values", sample->where, x->count);
    x->rank = shape->length;
    sample->layout = "";
    sample->channel_axis = 0;
}

static void expand(struct sample *sample, const struct json *step) {
    struct array *x = &sample->array;
    int64_t axis = integer(step, "axis", -99, -8, 7, sample->where), rank = (int64_t)x->rank + 1;
    axis = axis < 0 ? axis + rank : axis;
    if (axis < 0 || axis >= rank || rank > MAX_RANK)
        fail(UNUSABLE, "%s has an axis out of range", sample->where);
    for (int64_t i = rank - 1; i > axis; i--)
        x->shape[i] = x->shape[i - 1];
    x->shape[axis] = 1;
    x->rank = (size_t)rank;
    sample->layout = "";
    sample->channel_axis = 0;
}

static void layout(struct sample *sample, const struct json *step) {
    struct array *x = &sample->array;
    const char *to = word(step, "to", NULL, sample->where), *was = sample->layout;
    if (strcmp(to, "NCHW") && strcmp(to, "NHWC") && strcmp(to, "CHW") && strcmp(to, "HWC"))
        fail(UNUSABLE, "%s has no usable to", sample->where);
    if (!*was)
        fail(UNUSABLE, "%s is for an image, and the sample is none by then", sample->where);
    if (x->rank != strlen(was) || (*was == 'N' && x->shape[0] != 1))
        fail(UNUSABLE, "%s got the shape %s; wanted %s", sample->where, shape_text(x->rank, x->shape), was);
    const char *plain_was = was + (*was == 'N'), *plain_to = to + (*to == 'N');
    const int64_t *sizes = x->shape + (*was == 'N');
    size_t strides[3], from[3];
    int64_t shape[4] = {1, 1, 1, 1}, *out = shape + (*to == 'N');
    strides[2] = 1;
    strides[1] = (size_t)sizes[2];
    strides[0] = (size_t)(sizes[1] * sizes[2]);
    for (int i = 0; i < 3; i++) {
        size_t axis = (size_t)(strchr(plain_was, plain_to[i]) - plain_was);
        out[i] = sizes[axis];
        from[i] = strides[axis];
    }
    struct array y = array_make(x->name, x->dtype, strlen(to), shape);
    size_t width = dtype_size(x->dtype), n = 0;
    for (size_t a = 0; a < (size_t)out[0]; a++)
        for (size_t b = 0; b < (size_t)out[1]; b++)
            for (size_t c = 0; c < (size_t)out[2]; c++)
                memcpy((char *)y.data + width * n++,
                       (char *)x->data + width * (a * from[0] + b * from[1] + c * from[2]), width);
    *x = y;
    sample->layout = to;
    sample->channel_axis = (int)(strchr(to, 'C') - to) - (int)strlen(to);
}

static bool is_space(unsigned char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// The beginning and the end of a file, for models of bytes.
static void head_tail(struct sample *sample, const struct json *step) {
    struct array *x = &sample->array;
    int64_t most = (int64_t)MAX_VALUES;
    size_t head = (size_t)integer(step, "head", -1, 0, most, sample->where);
    size_t tail = (size_t)integer(step, "tail", -1, 0, most, sample->where);
    size_t block = (size_t)integer(step, "block", -1, 1, most, sample->where);
    double fill = (double)integer(step, "pad", 0, INT32_MIN, INT32_MAX, sample->where);
    bool strip = json_truth(step, "strip");
    if (x->rank != 1 || x->dtype != UINT8 || head + tail == 0)
        fail(UNUSABLE, "%s got %s %s; wanted uint8 (n,)", sample->where, dtype_name(x->dtype),
             shape_text(x->rank, x->shape));
    const unsigned char *bytes = x->data, *end = bytes + x->count;
    const unsigned char *first = bytes, *first_end = x->count > block ? bytes + block : end;
    const unsigned char *last = x->count > block ? end - block : bytes, *last_end = end;
    while (strip && first < first_end && is_space(*first))
        first++;
    while (strip && last_end > last && is_space(last_end[-1]))
        last_end--;
    int64_t length = (int64_t)(head + tail);
    struct array y = array_make(x->name, wanted_dtype(step, "int32", sample->where), 1, &length);
    for (size_t i = 0; i < y.count; i++)
        array_set(&y, i, fill);
    size_t heads = (size_t)(first_end - first), tails = (size_t)(last_end - last);
    for (size_t i = 0; i < head && i < heads; i++)
        array_set(&y, i, first[i]);
    for (size_t i = 1; i <= tail && i <= tails; i++)
        array_set(&y, y.count - i, last_end[-(ptrdiff_t)i]);
    *x = y;
    sample->layout = "";
    sample->channel_axis = -1;
}

static void run_step(struct sample *sample, const struct json *step) {
    const char *op = word(step, "op", NULL, sample->where);
    if (!strcmp(op, "normalize"))
        normalize(sample, step);
    else if (!strcmp(op, "cast"))
        cast(sample, step);
    else if (!strcmp(op, "quantize"))
        quantize(sample, step);
    else if (!strcmp(op, "pad") || !strcmp(op, "truncate"))
        resize_axis(sample, step, *op == 'p');
    else if (!strcmp(op, "reshape"))
        reshape(sample, step);
    else if (!strcmp(op, "expand"))
        expand(sample, step);
    else if (!strcmp(op, "layout"))
        layout(sample, step);
    else if (!strcmp(op, "head-tail"))
        head_tail(sample, step);
    else
        fail(NO_TOOL, "%s: this runner does not do that step; give the model's own inputs with "
             "--tensors", sample->where);
}

static void check_source(const char *source, const struct json *steps, const struct array *raw) {
    bool fits = !strcmp(source, "bytes") ? raw->rank == 1 && raw->dtype == UINT8
                : !strcmp(source, "image") ? raw->rank == 3 && raw->dtype == UINT8
                : !strcmp(source, "audio") ? raw->rank == 1 && raw->dtype == FLOAT32
                                           : !strcmp(source, "array");
    if (steps->length && json_get(&steps->items[0], "op") && !strcmp(source, "text"))
        fail(NO_TOOL, "this runner does not read text; give the model's own inputs with --tensors");
    if (!fits)
        fail(strcmp(source, "array") ? NO_TOOL : UNUSABLE,
             "got %s %s; of the source '%s' this runner takes an .npy that is decoded already "
             "(image: uint8 height, width, channels), or the model's own inputs with --tensors",
             dtype_name(raw->dtype), shape_text(raw->rank, raw->shape), source);
}

static const struct json *steps_of(const struct session *session, const char *input) {
    const struct json *all = session->manifest ? session->manifest->preprocess : NULL;
    return all ? json_get(all, input) : NULL;
}

bool has_preprocess(const struct session *session, const char *input) {
    return steps_of(session, input);
}

struct array preprocess(const struct session *session, const char *input, struct array raw) {
    const struct json *found = steps_of(session, input);
    const struct spec *spec = NULL;
    for (size_t i = 0; i < session->inputs.count; i++)
        if (!strcmp(session->inputs.items[i].name, input))
            spec = &session->inputs.items[i];
    if (!found)
        return raw;
    const char *source = json_get(found, "source")->text;
    const struct json *steps = json_get(found, "steps");
    check_source(source, steps, &raw);
    bool image = !strcmp(source, "image") || !strcmp(source, "array");
    struct sample sample = {raw, image ? "HWC" : "", -1, ""};
    for (size_t i = 0; i < steps->length; i++) {
        const struct json *op = json_get(&steps->items[i], "op");
        const char *name = op && op->kind == J_TEXT ? op->text : "?";
        if (!i && !strcmp(name, "decode"))
            continue; // what is given is decoded
        sample.where = take_format("input '%s': step %zu (%s)", input, i + 1, name);
        run_step(&sample, &steps->items[i]);
    }
    struct array *x = &sample.array;
    if (spec && x->rank + 1 == spec->rank) { // a batch of one
        memmove(x->shape + 1, x->shape, x->rank * sizeof *x->shape);
        x->shape[0] = 1;
        x->rank++;
    }
    x->name = input;
    return *x;
}
