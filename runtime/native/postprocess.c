#include <math.h>
#include <string.h>

#include "fail.h"
#include "memory.h"
#include "steps.h"

// An output, or what a step made of it.
struct entry {
    const char *name;
    struct array array;
    const char *json; // in place of the array
};

struct answer {
    size_t count, room;
    struct entry *items;
    const struct names *labels; // NULL without
    const char *where;
};

static struct entry *find(struct answer *answer, const char *name) {
    for (size_t i = 0; i < answer->count; i++)
        if (!strcmp(answer->items[i].name, name))
            return &answer->items[i];
    return NULL;
}

static struct entry *put(struct answer *answer, const char *name) {
    struct entry *found = find(answer, name);
    if (!found)
        found = &answer->items[answer->count++];
    found->name = name;
    return found;
}

static double decidable(const struct answer *answer, const struct array *x, size_t i) {
    double value = array_get(x, i);
    if (isnan(value))
        fail(UNUSABLE, "%s got NaN: the model failed on this sample", answer->where);
    return value;
}

static void need_floats(const struct answer *answer, const struct array *x) {
    if (!dtype_is_float(x->dtype))
        fail(UNUSABLE, "%s got %s; wanted floats: put dequantize before", answer->where,
             dtype_name(x->dtype));
}

// (rows, classes) of (classes,) or (N, classes)
static void rows_of(const struct answer *answer, const struct array *x, size_t *rows, size_t *classes) {
    if (x->rank != 1 && x->rank != 2)
        fail(UNUSABLE, "%s got the shape %s; wanted (classes,) or (N, classes)", answer->where,
             shape_text(x->rank, x->shape));
    *classes = (size_t)x->shape[x->rank - 1];
    *rows = x->rank == 2 ? (size_t)x->shape[0] : 1;
    if (answer->labels && answer->labels->count != *classes)
        fail(UNUSABLE, "%s has %zu labels for %zu classes", answer->where, answer->labels->count,
             *classes);
}

struct lines { // along an axis of an array
    size_t outer, length, inner;
};

static struct lines along(const struct answer *answer, const struct array *x, const struct json *step,
                          int64_t otherwise) {
    int64_t axis = (int64_t)json_number_or(step, "axis", (double)otherwise);
    if (axis < -(int64_t)x->rank || axis >= (int64_t)x->rank)
        fail(UNUSABLE, "%s has axis = %lld, got the shape %s", answer->where, (long long)axis,
             shape_text(x->rank, x->shape));
    size_t where = (size_t)(axis < 0 ? axis + (int64_t)x->rank : axis);
    struct lines found = {1, (size_t)x->shape[where], 1};
    for (size_t i = 0; i < x->rank; i++)
        if (i != where)
            *(i < where ? &found.outer : &found.inner) *= (size_t)x->shape[i];
    return found;
}

static struct array softmax(const struct answer *answer, const struct array *x, const struct json *step) {
    need_floats(answer, x);
    struct array y = array_make(x->name, FLOAT32, x->rank, x->shape);
    struct lines lines = along(answer, x, step, -1);
    for (size_t o = 0; o < lines.outer; o++)
        for (size_t i = 0; i < lines.inner; i++) {
            size_t first = o * lines.length * lines.inner + i;
            double most = -INFINITY, sum = 0;
            for (size_t k = 0; k < lines.length; k++)
                most = fmax(most, array_get(x, first + k * lines.inner));
            for (size_t k = 0; k < lines.length; k++)
                sum += exp(array_get(x, first + k * lines.inner) - most);
            for (size_t k = 0; k < lines.length; k++)
                array_set(&y, first + k * lines.inner,
                          exp(array_get(x, first + k * lines.inner) - most) / sum);
        }
    return y;
}

static struct array sigmoid(const struct answer *answer, const struct array *x) {
    need_floats(answer, x);
    struct array y = array_make(x->name, FLOAT32, x->rank, x->shape);
    for (size_t i = 0; i < x->count; i++)
        array_set(&y, i, 1 / (1 + exp(-array_get(x, i))));
    return y;
}

static double listed(const struct answer *answer, const struct json *values, size_t at, size_t count,
                     double otherwise) {
    if (!values)
        return otherwise;
    if (values->kind == J_LIST && values->length != count)
        fail(UNUSABLE, "%s has a list of %zu for %zu values", answer->where, values->length, count);
    return values->kind == J_LIST ? values->items[at].number : values->number;
}

static struct array dequantize(const struct answer *answer, const struct array *x,
                               const struct json *step) {
    const struct json *scale = json_get(step, "scale"), *zero = json_get(step, "zero_point");
    if (!scale || dtype_is_float(x->dtype))
        fail(UNUSABLE, "%s wants a scale and integers", answer->where);
    struct array y = array_make(x->name, FLOAT32, x->rank, x->shape);
    struct lines lines = x->rank ? along(answer, x, step, 0) : (struct lines){1, 1, 1};
    for (size_t i = 0; i < x->count; i++) {
        size_t at = i / lines.inner % lines.length;
        double steps = array_get(x, i) - listed(answer, zero, at, lines.length, 0);
        ((float *)y.data)[i] = (float)steps * (float)listed(answer, scale, at, lines.length, 1);
    }
    return y;
}

static struct array argmax(const struct answer *answer, const struct array *x, const struct json *step) {
    struct lines lines = along(answer, x, step, -1);
    int64_t shape[MAX_RANK];
    size_t rank = 0, axis = 0, before = 1;
    while (before != lines.outer || (size_t)x->shape[axis] != lines.length)
        before *= (size_t)x->shape[axis++];
    for (size_t i = 0; i < x->rank; i++)
        if (i != axis)
            shape[rank++] = x->shape[i];
    struct array y = array_make(x->name, INT64, rank, shape);
    for (size_t o = 0; o < lines.outer; o++)
        for (size_t i = 0; i < lines.inner; i++) {
            size_t best = 0, first = o * lines.length * lines.inner + i;
            for (size_t k = 1; k < lines.length; k++)
                if (decidable(answer, x, first + k * lines.inner) >
                    decidable(answer, x, first + best * lines.inner))
                    best = k;
            ((int64_t *)y.data)[o * lines.inner + i] = (int64_t)best;
        }
    return y;
}

static struct array threshold(const struct answer *answer, const struct array *x,
                              const struct json *step) {
    need_floats(answer, x);
    struct array at = array_make("at", x->dtype, 0, NULL), y = array_make(x->name, BOOL, x->rank, x->shape);
    array_set(&at, 0, json_number_or(step, "at", 0.5));
    for (size_t i = 0; i < x->count; i++)
        ((uint8_t *)y.data)[i] = decidable(answer, x, i) > array_get(&at, 0);
    return y;
}

static const char *over_labels(const struct answer *answer, const struct array *over) {
    struct text out = {0};
    size_t rows, classes;
    if (!answer->labels)
        fail(UNUSABLE, "%s has labels = true, and the bundle has no labels", answer->where);
    rows_of(answer, over, &rows, &classes);
    text_add(&out, "[", rows != 1);
    for (size_t r = 0; r < rows; r++) {
        text_format(&out, "%s[", r ? ", " : "");
        for (size_t c = 0; c < classes; c++)
            if (((uint8_t *)over->data)[r * classes + c]) {
                text_json_key(&out, NULL);
                text_json_string(&out, answer->labels->items[c]);
            }
        text_add(&out, "]", 1);
    }
    text_add(&out, "]", rows != 1);
    return out.bytes;
}

static void best_to_json(struct text *out, const struct answer *answer, const struct array *x,
                         size_t first, size_t classes, size_t k) {
    bool *used = take(classes);
    text_add(out, "[", 1);
    for (size_t n = 0; n < k; n++) {
        size_t best = classes;
        for (size_t c = 0; c < classes; c++)
            if (!used[c] && (best == classes || array_get(x, first + c) > array_get(x, first + best)))
                best = c;
        used[best] = true;
        text_json_key(out, NULL);
        text_add(out, "{", 1);
        text_json_member_integer(out, "index", (int64_t)best);
        if (answer->labels)
            text_json_member(out, "label", answer->labels->items[best]);
        if (dtype_is_float(x->dtype))
            text_json_member_number(out, "score", array_get(x, first + best));
        else
            text_json_member_integer(out, "score", (int64_t)array_get(x, first + best));
        text_add(out, "}", 1);
    }
    text_add(out, "]", 1);
}

static const char *top_k(struct answer *answer, const struct array *x, const struct json *step) {
    struct text out = {0};
    size_t rows, classes;
    const struct names *usual = answer->labels;
    const struct json *given = json_get(step, "labels");
    if (given && given->kind == J_LIST) {
        struct names *own = take(sizeof *own);
        *own = (struct names){given->length, take_array(given->length, sizeof(char *))};
        for (size_t i = 0; i < given->length; i++)
            own->items[i] = given->items[i].text ? given->items[i].text : "";
        answer->labels = own;
    }
    rows_of(answer, x, &rows, &classes);
    double k = json_number_or(step, "k", 0);
    if (!(k >= 1 && k <= (double)classes))
        fail(UNUSABLE, "%s has k = %g; there are %zu classes", answer->where, k, classes);
    for (size_t i = 0; i < x->count; i++)
        decidable(answer, x, i);
    text_add(&out, "[", rows != 1);
    for (size_t r = 0; r < rows; r++) {
        text_add(&out, ", ", r ? 2 : 0);
        best_to_json(&out, answer, x, r * classes, classes, (size_t)k);
    }
    text_add(&out, "]", rows != 1);
    answer->labels = usual;
    return out.bytes;
}

static void run_step(struct answer *answer, const struct json *step, const char *op, const char *usual) {
    const char *on = json_text_or(step, "on", usual);
    const struct entry *read = on ? find(answer, on) : NULL;
    if (!read || read->json)
        fail(UNUSABLE, "%s reads '%s', which is no output by then", answer->where, on ? on : "");
    struct array x = read->array;
    struct entry made = {json_text_or(step, "as", on), x, NULL};
    if (!strcmp(op, "softmax"))
        made.array = softmax(answer, &x, step);
    else if (!strcmp(op, "sigmoid"))
        made.array = sigmoid(answer, &x);
    else if (!strcmp(op, "dequantize"))
        made.array = dequantize(answer, &x, step);
    else if (!strcmp(op, "argmax"))
        made.array = argmax(answer, &x, step);
    else if (!strcmp(op, "top-k"))
        made.json = top_k(answer, &x, step);
    else if (!strcmp(op, "threshold")) {
        made.array = threshold(answer, &x, step);
        if (json_truth(step, "labels"))
            made.json = over_labels(answer, &made.array);
    } else
        fail(NO_TOOL, "%s: this runner does not do that step; its outputs are in --output", answer->where);
    *put(answer, made.name) = made;
}

void postprocess(const struct session *session, const struct arrays *outputs, struct text *text) {
    const struct manifest *manifest = session->manifest;
    const struct json *steps = manifest ? manifest->postprocess : NULL;
    struct answer answer = {.room = outputs->count + (steps ? steps->length : 0)};
    answer.items = take_array(answer.room, sizeof *answer.items);
    answer.labels = manifest && manifest->has_labels ? &manifest->labels : NULL;
    for (size_t i = 0; i < outputs->count; i++)
        *put(&answer, outputs->items[i].name) =
            (struct entry){outputs->items[i].name, outputs->items[i], NULL};
    for (size_t i = 0; steps && i < steps->length; i++) {
        const struct json *op = json_get(&steps->items[i], "op");
        const char *name = op && op->kind == J_TEXT ? op->text : "?";
        answer.where = take_format("step %zu (%s)", i + 1, name);
        run_step(&answer, &steps->items[i], name, outputs->count == 1 ? outputs->items[0].name : NULL);
    }
    for (size_t i = 0; i < answer.count; i++) {
        text_json_key(text, answer.items[i].name);
        if (answer.items[i].json)
            text_add(text, answer.items[i].json, strlen(answer.items[i].json));
        else
            array_to_json(text, &answer.items[i].array);
    }
}
