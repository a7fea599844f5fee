#include "samples.h"

#include <string.h>
#include <unistd.h>

#include "fail.h"
#include "memory.h"
#include "steps.h"

static const size_t MAX_FILE = (size_t)1 << 30;

static bool ends_with(const char *text, const char *suffix) {
    size_t length = strlen(text), wanted = strlen(suffix);
    return length >= wanted && !strcmp(text + length - wanted, suffix);
}

static bool is_input(const struct session *session, const char *name, size_t length) {
    for (size_t i = 0; i < session->inputs.count; i++)
        if (strlen(session->inputs.items[i].name) == length &&
            !strncmp(session->inputs.items[i].name, name, length))
            return true;
    return false;
}

// An `.npz` without `labels`, which evaluation data brings along.
static struct arrays input_arrays(const struct session *session, const char *path) {
    struct file file = file_open(path);
    struct arrays found = npz_parse(&file), kept = {0, take_array(found.count, sizeof(struct array))};
    file_close(&file);
    for (size_t i = 0; i < found.count; i++)
        if (strcmp(found.items[i].name, "labels") || is_input(session, "labels", 6))
            kept.items[kept.count++] = found.items[i];
    return kept;
}

static struct array read_file(const char *path) {
    size_t size;
    unsigned char *bytes = file_whole(path, MAX_FILE, &size);
    if (ends_with(path, ".npy"))
        return npy_parse(path, bytes, size);
    int64_t length = (int64_t)size;
    struct array raw = array_make(path, UINT8, 1, &length);
    memcpy(raw.data, bytes, size);
    return raw;
}

static void add(struct arrays *found, struct array one, const char *name, size_t most) {
    if (arrays_find(found, name))
        fail(UNUSABLE, "the input '%s' is given twice; one sample a call", name);
    if (found->count == most)
        fail(UNUSABLE, "more inputs are given than the model has");
    one.name = name;
    found->items[found->count++] = one;
}

struct arrays sample_from(const struct session *session, char **files, size_t count, bool tensors) {
    size_t most = session->inputs.count;
    struct arrays found = {0, take_array(most + 1, sizeof(struct array))};
    for (size_t i = 0; i < count; i++) {
        const char *path = files[i], *equals = strchr(path, '=');
        const char *name = most == 1 ? session->inputs.items[0].name : NULL;
        if (equals && access(path, F_OK)) {
            size_t length = (size_t)(equals - path);
            if (!is_input(session, path, length))
                fail(UNUSABLE, "no input '%.*s'", (int)length, path);
            name = take_text(path, length);
            path = equals + 1;
        }
        if (ends_with(path, ".npz")) {
            struct arrays all = input_arrays(session, path);
            for (size_t n = 0; n < all.count; n++)
                add(&found, all.items[n], all.items[n].name, most);
            continue;
        }
        if (!name)
            fail(UNUSABLE, "%s: the model has %zu inputs; say which: NAME=%s", path, most, path);
        if (!ends_with(path, ".npy") && (tensors || !has_preprocess(session, name)))
            fail(UNUSABLE, "%s is no array file; give an .npy or .npz", path);
        add(&found, read_file(path), name, most);
    }
    for (size_t i = 0; i < found.count && !tensors; i++)
        found.items[i] = preprocess(session, found.items[i].name, found.items[i]);
    return found;
}

struct arrays *samples_from(const struct session *session, const char *path, bool raw, size_t *count) {
    if (!path) {
        struct arrays *noise = take(sizeof *noise);
        *noise = session_noise(session);
        *count = 1;
        return noise;
    }
    struct arrays all = input_arrays(session, path);
    int64_t samples = all.count && all.items[0].rank ? all.items[0].shape[0] : 0;
    for (size_t i = 0; i < all.count; i++)
        if (!samples || !all.items[i].rank || all.items[i].shape[0] != samples)
            fail(UNUSABLE, "%s holds no samples; wanted arrays of one length", path);
    if (!all.count || all.count > session->inputs.count)
        fail(UNUSABLE, "%s holds %zu arrays, the model has %zu inputs", path, all.count,
             session->inputs.count);
    struct arrays *found = take_array((size_t)samples, sizeof *found);
    for (int64_t n = 0; n < samples; n++) {
        found[n] = (struct arrays){all.count, take_array(all.count, sizeof(struct array))};
        for (size_t i = 0; i < all.count; i++) {
            struct array *one = &found[n].items[i];
            size_t rank = all.items[i].rank;
            *one = all.items[i];
            one->count /= (size_t)samples;
            one->bytes /= (size_t)samples;
            one->data = (char *)all.items[i].data + (size_t)n * one->bytes;
            one->shape[0] = 1;
            bool batch = false; // the model has that axis
            for (size_t j = 0; j < session->inputs.count && !raw; j++)
                batch |= !strcmp(session->inputs.items[j].name, one->name) &&
                         session->inputs.items[j].rank == rank;
            if (batch)
                continue;
            one->rank = rank - 1;
            memmove(one->shape, all.items[i].shape + 1, one->rank * sizeof *one->shape);
            if (raw)
                *one = preprocess(session, one->name, *one);
        }
    }
    *count = (size_t)samples;
    return found;
}
