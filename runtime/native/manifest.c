#include "manifest.h"

#include <math.h>
#include <string.h>

#include "fail.h"
#include "memory.h"

static const char SCHEMA[] = "edgekit.bundle/1";
enum { FREE_FORM_DEPTH = 64 };

static _Noreturn void mistyped(const struct json *value, const char *where, const char *wanted) {
    fail(UNUSABLE, "%s is %s, wanted %s", where, json_kind_name(value), wanted);
}

// What a terminal would act on, and halves of characters that cannot be printed.
static bool has_control(const char *text, size_t length) {
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i], d = i + 1 < length ? (unsigned char)text[i + 1] : 0;
        if (c < 0x20 || c == 0x7f || (c == 0xc2 && d < 0xa0) || (c == 0xed && d >= 0xa0))
            return true;
    }
    return false;
}

static const char *as_text(const struct json *value, const char *where) {
    if (value->kind != J_TEXT)
        mistyped(value, where, "str");
    if (has_control(value->text, value->length))
        fail(UNUSABLE, "%s holds control characters", where);
    return value->text;
}

static int64_t as_integer(const struct json *value, const char *where) {
    if (value->kind != J_INT || !value->fits)
        mistyped(value, where, "int");
    return value->integer;
}

static double as_number(const struct json *value, const char *where) {
    if ((value->kind != J_INT && value->kind != J_FLOAT) || !isfinite(value->number))
        mistyped(value, where, "float");
    return value->number;
}

static const struct json *as_list(const struct json *value, const char *where) {
    if (value->kind != J_LIST)
        mistyped(value, where, "a list");
    return value;
}

static const struct json *as_object(const struct json *value, const char *where) {
    if (value->kind != J_OBJECT)
        fail(UNUSABLE, "%s is %s, wanted an object", where, json_kind_name(value));
    return value;
}

static void check_keys(const struct json *object, const char *where) {
    for (size_t i = 0; i < object->length; i++)
        as_text(&object->keys[i], take_format("a key of %s", where));
}

static void check_depth(const struct json *value, const char *where, int left) {
    if ((value->kind != J_LIST && value->kind != J_OBJECT) || !value->length)
        return;
    if (!left)
        fail(UNUSABLE, "%s is nested more than %d deep", where, FREE_FORM_DEPTH);
    for (size_t i = 0; i < value->length; i++)
        check_depth(&value->items[i], where, left - 1);
}

static const struct json *free_form(const struct json *value, const char *where) {
    as_object(value, where);
    check_keys(value, where);
    for (size_t i = 0; i < value->length; i++)
        check_depth(&value->items[i], where, FREE_FORM_DEPTH - 1);
    return value;
}

// An object with these keys and no others; a name that ends with '?' may be missing.
static const struct json *fields(const struct json *value, const char *where,
                                 const char *const *known) {
    as_object(value, where);
    for (size_t i = 0; i < value->length; i++) {
        const char *key = value->keys[i].text;
        size_t length = value->keys[i].length;
        bool found = false;
        for (const char *const *one = known; *one && !found; one++)
            found = !strncmp(*one, key, length) && strcspn(*one, "?") == length;
        if (!found)
            fail(UNUSABLE, "%s has the unknown key '%s'", where, key);
    }
    for (const char *const *one = known; *one; one++)
        if (!strchr(*one, '?') && !json_get(value, *one))
            fail(UNUSABLE, "%s has no '%s'", where, *one);
    return value;
}

static const struct json *optional(const struct json *object, const char *key) {
    const struct json *found = json_get(object, key);
    return found && found->kind != J_NULL ? found : NULL;
}

static struct names as_names(const struct json *value, const char *where) {
    as_list(value, where);
    struct names found = {value->length, take_array(value->length, sizeof(char *))};
    for (size_t i = 0; i < value->length; i++)
        found.items[i] = as_text(&value->items[i], where);
    return found;
}

static void read_spec(const struct json *value, const char *where, struct spec *spec) {
    static const char *const known[] = {"name", "dtype", "shape", "layout?", "range?", "example?", NULL};
    fields(value, where, known);
    spec->name = as_text(json_get(value, "name"), where);
    spec->dtype = as_text(json_get(value, "dtype"), where);
    const struct json *layout = optional(value, "layout");
    spec->layout = layout ? as_text(layout, where) : NULL;
    const struct json *shape = as_list(json_get(value, "shape"), where);
    if (shape->length > MAX_RANK)
        fail(UNUSABLE, "%s has %zu dimensions, at most %d are allowed", where, shape->length, MAX_RANK);
    spec->rank = shape->length;
    for (size_t i = 0; i < shape->length; i++) {
        const struct json *one = &shape->items[i];
        if (one->kind == J_TEXT) {
            spec->shape[i].name = one->text;
            continue;
        }
        spec->shape[i].size = as_integer(one, where);
        if (spec->shape[i].size < 1)
            fail(UNUSABLE, "'%s' has a dimension of %lld, wanted 1 or more", spec->name,
                 (long long)spec->shape[i].size);
    }
    const struct json *range = optional(value, "range");
    if (range) {
        if (as_list(range, where)->length != 2)
            mistyped(range, where, "two numbers");
        spec->has_range = true;
        spec->low = as_number(&range->items[0], where);
        spec->high = as_number(&range->items[1], where);
        if (spec->low > spec->high)
            fail(UNUSABLE, "'%s' has a range from high to low", spec->name);
    }
    const struct json *example = optional(value, "example");
    if (example) {
        if (as_list(example, where)->length != spec->rank)
            fail(UNUSABLE, "'%s' has an example that is not its shape", spec->name);
        spec->has_example = true;
        for (size_t i = 0; i < spec->rank; i++)
            spec->example[i] = as_integer(&example->items[i], where);
        if (!spec_accepts(spec, spec->rank, spec->example))
            fail(UNUSABLE, "'%s' has an example that is not its shape", spec->name);
    }
}

static void no_twins(struct names names, const char *what) {
    for (size_t i = 0; i < names.count; i++)
        for (size_t j = 0; j < i; j++)
            if (!strcmp(names.items[i], names.items[j]))
                fail(UNUSABLE, "the manifest names the %s '%s' twice", what, names.items[i]);
}

enum { MOST_SPECS = 4096, MOST_FILES = 4096, MOST_VARIANTS = 256 };

static void at_most(const struct json *list, size_t most, const char *where) {
    if (list->length > most)
        fail(UNUSABLE, "%s has %zu entries, at most %zu are allowed", where, list->length, most);
}

static struct specs read_specs(const struct json *value, const char *where) {
    as_list(value, where);
    at_most(value, MOST_SPECS, where);
    struct specs found = {value->length, take_array(value->length, sizeof(struct spec))};
    struct names names = {value->length, take_array(value->length, sizeof(char *))};
    for (size_t i = 0; i < value->length; i++) {
        read_spec(&value->items[i], where, &found.items[i]);
        names.items[i] = found.items[i].name;
    }
    no_twins(names, where);
    return found;
}

static void read_file(const struct json *value, struct file_entry *entry) {
    static const char *const known[] = {"path", "sha256", "size_bytes", "crc32", "deflated?", NULL};
    static const char *const packed[] = {"size_bytes", "sha256", NULL};
    fields(value, "files", known);
    entry->path = as_text(json_get(value, "path"), "files.path");
    entry->sha256 = as_text(json_get(value, "sha256"), "files.sha256");
    int64_t size = as_integer(json_get(value, "size_bytes"), "files.size_bytes");
    int64_t crc = as_integer(json_get(value, "crc32"), "files.crc32");
    if (size < 0 || crc < 0 || crc > UINT32_MAX)
        fail(UNUSABLE, "%s has a size or checksum out of range", entry->path);
    entry->size = (uint64_t)size;
    entry->crc32 = (uint32_t)crc;
    const struct json *deflated = json_get(value, "deflated");
    entry->packed_size = entry->size;
    if (!deflated || deflated->kind == J_NULL)
        return;
    fields(deflated, "files.deflated", packed);
    entry->packed_sha256 = as_text(json_get(deflated, "sha256"), "files.deflated.sha256");
    size = as_integer(json_get(deflated, "size_bytes"), "files.deflated.size_bytes");
    if (size < 0)
        fail(UNUSABLE, "%s has a size out of range", entry->path);
    entry->packed_size = (uint64_t)size;
}

static void read_golden(const struct json *value, struct variant *variant) {
    static const char *const known[] = {"inputs", "outputs", "samples", "tolerance", "synthetic?", NULL};
    static const char *const limits[] = {"atol", "rtol", NULL};
    fields(value, "golden", known);
    variant->golden_inputs = as_text(json_get(value, "inputs"), "golden.inputs");
    variant->golden_outputs = as_text(json_get(value, "outputs"), "golden.outputs");
    variant->golden_samples = as_integer(json_get(value, "samples"), "golden.samples");
    const struct json *synthetic = json_get(value, "synthetic");
    if (synthetic && synthetic->kind != J_BOOL)
        mistyped(synthetic, "golden.synthetic", "bool");
    const struct json *all = as_object(json_get(value, "tolerance"), "golden.tolerance");
    check_keys(all, "golden.tolerance");
    variant->tolerances = all->length;
    variant->tolerance = take_array(all->length, sizeof *variant->tolerance);
    for (size_t i = 0; i < all->length; i++) {
        const struct json *one = fields(&all->items[i], "golden.tolerance", limits);
        variant->tolerance[i] = (struct tolerance){all->keys[i].text,
                                                   as_number(json_get(one, "atol"), "atol"),
                                                   as_number(json_get(one, "rtol"), "rtol")};
    }
}

static void read_variant(const struct json *value, struct variant *variant) {
    static const char *const known[] = {
        "id", "engine", "format", "files", "scheme", "threads", "precision", "input_names",
        "output_names", "placement", "golden", "expected?", "on_misplacement?", "machines?",
        "memory_bytes?", "macs?", NULL};
    fields(value, "variant", known);
    variant->id = as_text(json_get(value, "id"), "variant.id");
    // it becomes a folder's name
    if (!*variant->id || *variant->id == '.' || strpbrk(variant->id, "/\\"))
        fail(UNUSABLE, "the variant's id '%s' is no name for a folder", variant->id);
    variant->engine = as_text(json_get(value, "engine"), "variant.engine");
    variant->format = as_text(json_get(value, "format"), "variant.format");
    variant->scheme = as_text(json_get(value, "scheme"), "variant.scheme");
    variant->precision = as_text(json_get(value, "precision"), "variant.precision");
    variant->files = as_names(json_get(value, "files"), "variant.files");
    variant->input_names = as_names(json_get(value, "input_names"), "variant.input_names");
    variant->output_names = as_names(json_get(value, "output_names"), "variant.output_names");
    variant->threads = as_integer(json_get(value, "threads"), "variant.threads");
    const struct json *placement = as_object(json_get(value, "placement"), "variant.placement");
    check_keys(placement, "variant.placement");
    variant->shares = placement->length;
    variant->placement = take_array(placement->length, sizeof(struct share));
    for (size_t i = 0; i < placement->length; i++)
        variant->placement[i] = (struct share){
            placement->keys[i].text, as_number(&placement->items[i], "variant.placement")};
    read_golden(json_get(value, "golden"), variant);
    const struct json *one = json_get(value, "expected");
    variant->expected = one ? free_form(one, "variant.expected") : NULL;
    one = json_get(value, "on_misplacement");
    variant->on_misplacement = one ? as_text(one, "variant.on_misplacement") : "refuse";
    one = json_get(value, "machines");
    variant->machines = one ? as_names(one, "variant.machines") : (struct names){0, NULL};
    one = optional(value, "memory_bytes");
    variant->memory_bytes = one ? as_integer(one, "variant.memory_bytes") : -1;
    one = json_get(value, "macs"); // for accelerators, which are not of this runner
    if (one) {
        check_keys(as_object(one, "variant.macs"), "variant.macs");
        for (size_t i = 0; i < one->length; i++)
            if (as_integer(&one->items[i], "variant.macs") < 0)
                fail(UNUSABLE, "variant '%s' has negative macs", variant->id);
    }
}

static void check_listed(const struct manifest *manifest, const char *path, const char *id) {
    for (size_t i = 0; i < manifest->files; i++)
        if (!strcmp(manifest->file[i].path, path))
            return;
    fail(UNUSABLE, "variant '%s' needs '%s', not listed in files", id, path);
}

static const char *last_part(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static void check_names(struct names names, size_t wanted, const char *id) {
    if (names.count != wanted)
        fail(UNUSABLE, "variant '%s' names other inputs or outputs than the model", id);
    no_twins(names, "engine's name");
}

static void check_variant(const struct manifest *manifest, const struct variant *one) {
    at_most(&(struct json){.length = one->files.count}, 64, "variant.files");
    for (size_t i = 0; i < one->files.count; i++) {
        check_listed(manifest, one->files.items[i], one->id);
        for (size_t j = 0; j < i; j++)
            if (!strcmp(last_part(one->files.items[i]), last_part(one->files.items[j])))
                fail(UNUSABLE, "variant '%s' has two files of one name", one->id);
    }
    check_listed(manifest, one->golden_inputs, one->id);
    check_listed(manifest, one->golden_outputs, one->id);
    check_names(one->input_names, manifest->inputs.count, one->id);
    check_names(one->output_names, manifest->outputs.count, one->id);
    if (one->threads < 1)
        fail(UNUSABLE, "variant '%s' wants %lld threads", one->id, (long long)one->threads);
    if (strcmp(one->on_misplacement, "refuse") && strcmp(one->on_misplacement, "warn") &&
        strcmp(one->on_misplacement, "next"))
        fail(UNUSABLE, "variant '%s' says '%s' on misplacement; known: refuse, warn, next", one->id,
             one->on_misplacement);
    if (one->golden_samples < 1)
        fail(UNUSABLE, "variant '%s' has no golden samples, wanted 1 or more", one->id);
    bool fits = one->tolerances == manifest->outputs.count;
    for (size_t i = 0; i < one->tolerances && fits; i++) {
        const struct tolerance *limit = &one->tolerance[i];
        if (limit->atol < 0 || limit->rtol < 0)
            fail(UNUSABLE, "variant '%s' has a negative tolerance", one->id);
        fits = false;
        for (size_t j = 0; j < manifest->outputs.count; j++)
            fits |= !strcmp(manifest->outputs.items[j].name, limit->output);
    }
    if (!fits)
        fail(UNUSABLE, "variant '%s' wants one tolerance for each output", one->id);
}

static bool has_spec(const struct specs *specs, const char *name) {
    for (size_t i = 0; i < specs->count; i++)
        if (!strcmp(specs->items[i].name, name))
            return true;
    return false;
}

static void check_states(const struct manifest *manifest) {
    static const char *const known[] = {"input", "output", NULL};
    if (!manifest->states)
        return;
    as_list(manifest->states, "states");
    at_most(manifest->states, MOST_SPECS, "states");
    for (size_t i = 0; i < manifest->states->length; i++) {
        const struct json *one = fields(&manifest->states->items[i], "states", known);
        const char *input = as_text(json_get(one, "input"), "states.input");
        const char *output = as_text(json_get(one, "output"), "states.output");
        if (!has_spec(&manifest->inputs, input) || !has_spec(&manifest->outputs, output))
            fail(UNUSABLE, "the state '%s' fed by '%s' is not the model's", input, output);
    }
}

static void check_steps(const struct json *steps, const char *where) {
    as_list(steps, where);
    for (size_t i = 0; i < steps->length; i++)
        free_form(&steps->items[i], where);
}

static void check_processing(const struct manifest *manifest) {
    static const char *const known[] = {"source", "steps", NULL};
    if (manifest->postprocess)
        check_steps(manifest->postprocess, "postprocess");
    if (!manifest->preprocess)
        return;
    as_object(manifest->preprocess, "preprocess");
    at_most(manifest->preprocess, MOST_SPECS, "preprocess");
    for (size_t i = 0; i < manifest->preprocess->length; i++) {
        const char *name = as_text(&manifest->preprocess->keys[i], "preprocess");
        const struct json *one = fields(&manifest->preprocess->items[i], "preprocess", known);
        if (!has_spec(&manifest->inputs, name))
            fail(UNUSABLE, "there is preprocessing for '%s', which is no input", name);
        as_text(json_get(one, "source"), "preprocess.source");
        check_steps(json_get(one, "steps"), "preprocess.steps");
    }
}

static const char *as_sequence(const struct json *value) {
    if (value->kind != J_INT)
        mistyped(value, "manifest.sequence", "int");
    return value->text;
}

struct manifest *manifest_parse(const char *bytes, size_t size) {
    static const char *const known[] = {
        "schema", "bundle_id", "sequence", "name", "created", "profiles", "inputs", "outputs",
        "variants", "files", "labels?", "states?", "preprocess?", "postprocess?", "provenance?",
        "signature?", NULL};
    struct json *raw = json_parse(bytes, size);
    const struct json *schema = json_get(raw, "schema");
    if (!schema || schema->kind != J_TEXT || schema->length != sizeof SCHEMA - 1 ||
        strcmp(schema->text, SCHEMA))
        fail(UNUSABLE, "the manifest's schema is %s, this runtime reads '%s'; make the bundle again "
             "or update edgekit-runtime", schema && schema->text ? schema->text : "missing", SCHEMA);
    fields(raw, "manifest", known);
    struct manifest *found = take(sizeof *found);
    found->bundle_id = as_text(json_get(raw, "bundle_id"), "manifest.bundle_id");
    found->sequence = as_sequence(json_get(raw, "sequence"));
    found->name = as_text(json_get(raw, "name"), "manifest.name");
    found->created = as_text(json_get(raw, "created"), "manifest.created");
    found->profiles = as_names(json_get(raw, "profiles"), "manifest.profiles");
    found->inputs = read_specs(json_get(raw, "inputs"), "input");
    found->outputs = read_specs(json_get(raw, "outputs"), "output");
    const struct json *variants = as_list(json_get(raw, "variants"), "manifest.variants");
    const struct json *files = as_list(json_get(raw, "files"), "manifest.files");
    at_most(variants, MOST_VARIANTS, "manifest.variants");
    at_most(files, MOST_FILES, "manifest.files");
    found->variants = variants->length;
    found->variant = take_array(variants->length, sizeof *found->variant);
    for (size_t i = 0; i < variants->length; i++)
        read_variant(&variants->items[i], &found->variant[i]);
    found->files = files->length;
    found->file = take_array(files->length, sizeof *found->file);
    for (size_t i = 0; i < files->length; i++)
        read_file(&files->items[i], &found->file[i]);
    const struct json *labels = optional(raw, "labels");
    if (labels) {
        found->has_labels = true;
        found->labels = as_names(labels, "manifest.labels");
    }
    found->states = json_get(raw, "states");
    found->preprocess = json_get(raw, "preprocess");
    found->postprocess = json_get(raw, "postprocess");
    if (json_get(raw, "provenance"))
        free_form(json_get(raw, "provenance"), "manifest.provenance");
    if (optional(raw, "signature"))
        as_text(optional(raw, "signature"), "manifest.signature");
    if (!found->variants)
        fail(UNUSABLE, "the manifest has no variant");
    struct names ids = {found->variants, take_array(found->variants, sizeof(char *))};
    for (size_t i = 0; i < found->variants; i++)
        ids.items[i] = found->variant[i].id;
    no_twins(ids, "variant");
    check_states(found);
    check_processing(found);
    for (size_t i = 0; i < found->variants; i++)
        check_variant(found, &found->variant[i]);
    return found;
}

struct variant *manifest_variant(struct manifest *manifest, const char *id) {
    if (!id)
        return &manifest->variant[0];
    char *known = "";
    for (size_t i = 0; i < manifest->variants; i++) {
        if (!strcmp(manifest->variant[i].id, id))
            return &manifest->variant[i];
        known = take_format("%s%s%s", known, *known ? ", " : "", manifest->variant[i].id);
    }
    fail(UNUSABLE, "no variant '%s' in this bundle; it has: %s", id, known);
}

static bool same_specs(const struct specs *one, const struct specs *other) {
    if (one->count != other->count)
        return false;
    for (size_t i = 0; i < one->count; i++) {
        const struct spec *a = &one->items[i], *b = &other->items[i];
        if (strcmp(a->name, b->name) || strcmp(a->dtype, b->dtype) || a->rank != b->rank)
            return false;
        for (size_t d = 0; d < a->rank; d++)
            if (a->shape[d].size != b->shape[d].size)
                return false;
    }
    return true;
}

bool same_interface(const struct manifest *one, const struct manifest *other) {
    return same_specs(&one->inputs, &other->inputs) && same_specs(&one->outputs, &other->outputs);
}

bool spec_accepts(const struct spec *spec, size_t rank, const int64_t *shape) {
    if (rank != spec->rank)
        return false;
    for (size_t i = 0; i < rank; i++) {
        if (spec->shape[i].size) {
            if (spec->shape[i].size != shape[i])
                return false;
            continue;
        }
        for (size_t j = 0; j < i; j++)
            if (!spec->shape[j].size && !strcmp(spec->shape[j].name, spec->shape[i].name) &&
                shape[j] != shape[i])
                return false;
    }
    return true;
}

void spec_usual_shape(const struct spec *spec, int64_t *shape) {
    for (size_t i = 0; i < spec->rank; i++)
        shape[i] = spec->has_example ? spec->example[i]
                   : spec->shape[i].size ? spec->shape[i].size : 1;
}

char *spec_text(const struct spec *spec) {
    char *text = take_format("%s: %s [", spec->name, spec->dtype);
    for (size_t i = 0; i < spec->rank; i++) {
        const struct dimension *one = &spec->shape[i];
        text = one->size ? take_format("%s%s%lld", text, i ? ", " : "", (long long)one->size)
                         : take_format("%s%s%s", text, i ? ", " : "", one->name);
    }
    return take_format("%s]", text);
}
