// LiteRT through the C interface of its `libLiteRt.so`. Wheels bring that library without headers,
// so what is used of it is declared here: as of ai_edge_litert 2.3, whose layout of structs is
// documented as stable. Every function is looked up when the library is loaded.
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine_kind.h"
#include "fail.h"
#include "memory.h"

enum { LITERT_RANK = 8, MAX_PORTS = 4096, PADDING = 128, CPU = 1, SILENT = 4, INT_VALUE = 2,
       TAG_ACCELERATORS = 24, TAG_SEVERITY = 25, BAD_FLATBUFFER = 501 };

struct layout {
    uint32_t rank : 7, has_strides : 1;
    int32_t sizes[LITERT_RANK];
    uint32_t strides[LITERT_RANK];
};

struct tensor_type {
    int32_t element;
    struct layout layout;
};
_Static_assert(sizeof(struct tensor_type) == 72, "as LiteRT has it");

struct environment_option {
    int32_t tag;
    struct {
        int32_t type;
        int64_t value;
    } any;
};

typedef struct handle *handle; // of any of its objects
typedef int (*named)(handle signature, size_t index, const char **name);
typedef int (*tensor_of)(handle signature, size_t index, handle *tensor);
typedef int (*counted)(handle object, size_t *count);

static struct {
    int (*CreateEnvironment)(int count, const struct environment_option *options, handle *made);
    int (*CreateModelFromBuffer)(handle environment, const void *bytes, size_t size, handle *made);
    int (*CreateOptions)(handle *made);
    int (*SetOptionsHardwareAccelerators)(handle options, int set);
    int (*CreateOpaqueOptions)(const char *name, void *text, void (*release)(void *), handle *made);
    int (*AddOpaqueOptions)(handle options, handle more);
    int (*CreateCompiledModel)(handle environment, handle model, handle options, handle *made);
    int (*CompiledModelIsFullyAccelerated)(handle compiled, bool *whole);
    counted GetNumModelSignatures, GetNumSignatureInputs, GetNumSignatureOutputs;
    int (*GetModelSignature)(handle model, size_t index, handle *signature);
    named GetSignatureInputName, GetSignatureOutputName;
    tensor_of GetSignatureInputTensorByIndex, GetSignatureOutputTensorByIndex;
    int (*GetRankedTensorType)(handle tensor, struct tensor_type *type);
    int (*CompiledModelResizeInputTensor)(handle compiled, size_t signature, size_t index,
                                          const int *sizes, size_t rank);
    int (*GetCompiledModelOutputTensorLayouts)(handle compiled, size_t signature, size_t count,
                                               struct layout *layouts, bool allocate);
    int (*CreateTensorBufferFromHostMemory)(const struct tensor_type *type, void *bytes, size_t size,
                                            void (*release)(void *), handle *made);
    int (*RunCompiledModel)(handle compiled, size_t signature, size_t ins, handle *in, size_t outs,
                            handle *out);
    void (*DestroyTensorBuffer)(handle buffer);
    void (*DestroyCompiledModel)(handle compiled);
    void (*DestroyOptions)(handle options);
    void (*DestroyModel)(handle model);
    void (*DestroyEnvironment)(handle environment);
} api;

static const struct {
    const char *name;
    size_t offset;
} FUNCTIONS[] = {
#define FUNCTION(name) {"LiteRt" #name, offsetof(__typeof__(api), name)}
    FUNCTION(CreateEnvironment), FUNCTION(CreateModelFromBuffer), FUNCTION(CreateOptions),
    FUNCTION(SetOptionsHardwareAccelerators), FUNCTION(CreateOpaqueOptions),
    FUNCTION(AddOpaqueOptions), FUNCTION(CreateCompiledModel),
    FUNCTION(CompiledModelIsFullyAccelerated), FUNCTION(GetNumModelSignatures),
    FUNCTION(GetNumSignatureInputs), FUNCTION(GetNumSignatureOutputs), FUNCTION(GetModelSignature),
    FUNCTION(GetSignatureInputName), FUNCTION(GetSignatureOutputName),
    FUNCTION(GetSignatureInputTensorByIndex), FUNCTION(GetSignatureOutputTensorByIndex),
    FUNCTION(GetRankedTensorType), FUNCTION(CompiledModelResizeInputTensor),
    FUNCTION(GetCompiledModelOutputTensorLayouts), FUNCTION(CreateTensorBufferFromHostMemory),
    FUNCTION(RunCompiledModel), FUNCTION(DestroyTensorBuffer), FUNCTION(DestroyCompiledModel),
    FUNCTION(DestroyOptions), FUNCTION(DestroyModel), FUNCTION(DestroyEnvironment),
#undef FUNCTION
};

struct loaded {
    struct engine base;
    handle environment, model, options, compiled;
};

struct buffers {
    handle *inputs, *outputs;
};

static void check(int status, const char *what) {
    if (status)
        fail(NO_TOOL, "the engine failed: LiteRT's %s gives status %d", what, status);
}

static void find_library(void) {
    const char *name = getenv("EDGEKIT_LITERT");
    void *library = dlopen(name && *name ? name : "libLiteRt.so", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        fail_next(NO_TOOL, "the engine 'litert' is not here: %s", dlerror());
    for (size_t i = 0; i < sizeof FUNCTIONS / sizeof *FUNCTIONS; i++) {
        void *found = dlsym(library, FUNCTIONS[i].name);
        if (!found)
            fail_next(NO_TOOL, "the engine 'litert' has no %s: another version than 2.3",
                      FUNCTIONS[i].name);
        memcpy((char *)&api + FUNCTIONS[i].offset, &found, sizeof found);
    }
}

// TFLite's numbers of types
static enum dtype dtype_from(int32_t element) {
    static const enum dtype known[] = {[1] = FLOAT32, [2] = INT32, [3] = UINT8,   [4] = INT64,
                                       [6] = BOOL,    [7] = INT16, [9] = INT8,    [10] = FLOAT16,
                                       [11] = FLOAT64, [13] = UINT64, [16] = UINT32, [17] = UINT16};
    return element >= 0 && (size_t)element < sizeof known / sizeof *known ? known[element] : NO_DTYPE;
}

static int32_t element_of(const char *dtype) {
    for (int32_t i = 1; i <= 17; i++)
        if (dtype_from(i) && !strcmp(dtype_name(dtype_from(i)), dtype))
            return i;
    return 0;
}

static void read_port(handle tensor, struct spec *spec) {
    struct tensor_type type = {0};
    check(api.GetRankedTensorType(tensor, &type), "GetRankedTensorType");
    spec->dtype = dtype_name(dtype_from(type.element));
    if (!*spec->dtype)
        fail(NO_TOOL, "'%s' is no tensor of numbers; this runner knows only those", spec->name);
    spec->rank = type.layout.rank;
    if (spec->rank > LITERT_RANK)
        fail(UNUSABLE, "'%s' has %zu dimensions", spec->name, spec->rank);
    for (size_t i = 0; i < spec->rank; i++) {
        spec->shape[i].size = type.layout.sizes[i] > 0 ? type.layout.sizes[i] : 0;
        if (!spec->shape[i].size)
            spec->shape[i].name = take_format("%s_%zu", spec->name, i);
    }
}

static struct specs read_ports(handle signature, counted count_of, named name_of, tensor_of tensor) {
    size_t count;
    check(count_of(signature, &count), "signature");
    if (count > MAX_PORTS)
        fail(UNUSABLE, "the model has %zu inputs or outputs", count);
    struct specs found = {count, take_array(count, sizeof(struct spec))};
    for (size_t i = 0; i < count; i++) {
        const char *name;
        handle one;
        check(name_of(signature, i, &name), "signature");
        check(tensor(signature, i, &one), "signature");
        found.items[i].name = take_text(name, strlen(name));
        read_port(one, &found.items[i]);
    }
    return found;
}

static void make_environment(struct loaded *engine) {
    const struct environment_option wanted[] = {{TAG_ACCELERATORS, {INT_VALUE, CPU}},
                                                {TAG_SEVERITY, {INT_VALUE, SILENT}}};
    check(api.CreateEnvironment(2, wanted, &engine->environment), "CreateEnvironment");
}

static void make_options(struct loaded *engine, int64_t threads) {
    handle more;
    char text[64];
    snprintf(text, sizeof text, "num_threads = %d\n", (int)threads);
    check(api.CreateOptions(&engine->options), "CreateOptions");
    check(api.SetOptionsHardwareAccelerators(engine->options, CPU), "SetOptionsHardwareAccelerators");
    check(api.CreateOpaqueOptions("xnnpack", strdup(text), free, &more), "CreateOpaqueOptions");
    check(api.AddOpaqueOptions(engine->options, more), "AddOpaqueOptions");
}

static struct engine *load(const void *model, size_t size, int64_t threads) {
    struct loaded *engine = take(sizeof *engine);
    handle signature;
    size_t signatures;
    bool whole = false;
    find_library();
    if (size < 8 || memcmp((const char *)model + 4, "TFL3", 4))
        fail(UNUSABLE, "not a TFLite model: wanted 'TFL3' at byte 4");
    make_environment(engine);
    make_options(engine, threads);
    int status = api.CreateModelFromBuffer(engine->environment, model, size, &engine->model);
    if (!status)
        status = api.CreateCompiledModel(engine->environment, engine->model, engine->options,
                                         &engine->compiled);
    if (status)
        fail(UNUSABLE, "LiteRT cannot load the model: status %d%s", status,
             status == BAD_FLATBUFFER ? ", it is damaged" : "");
    check(api.GetNumModelSignatures(engine->model, &signatures), "GetNumModelSignatures");
    if (signatures != 1)
        fail(UNUSABLE, "the model has %zu signatures, this runner takes one", signatures);
    check(api.GetModelSignature(engine->model, 0, &signature), "GetModelSignature");
    engine->base.inputs = read_ports(signature, api.GetNumSignatureInputs, api.GetSignatureInputName,
                                     api.GetSignatureInputTensorByIndex);
    engine->base.outputs = read_ports(signature, api.GetNumSignatureOutputs,
                                      api.GetSignatureOutputName, api.GetSignatureOutputTensorByIndex);
    check(api.CompiledModelIsFullyAccelerated(engine->compiled, &whole), "IsFullyAccelerated");
    engine->base.delegate = whole ? "XNNPACK" : "XNNPACK and reference kernels";
    engine->base.version = "2.3"; // the library does not say; another one is refused
    return &engine->base;
}

static void unload(struct engine *base) {
    struct loaded *engine = (struct loaded *)base;
    api.DestroyCompiledModel(engine->compiled);
    api.DestroyOptions(engine->options);
    api.DestroyModel(engine->model);
    api.DestroyEnvironment(engine->environment);
}

static handle buffer_over(const struct spec *spec, struct array *array) {
    struct tensor_type type = {.element = element_of(spec->dtype)};
    handle made;
    type.layout.rank = spec->rank & 0x7f;
    for (size_t i = 0; i < spec->rank; i++)
        type.layout.sizes[i] = (int32_t)array->shape[i];
    check(api.CreateTensorBufferFromHostMemory(&type, array->data, array->bytes, NULL, &made),
          "CreateTensorBufferFromHostMemory");
    return made;
}

// XNNPACK reads some bytes beyond the end of a tensor.
static struct array padded(const struct spec *spec, const int64_t *shape) {
    struct array made = array_make(spec->name, dtype_of(spec->dtype), spec->rank, shape);
    made.data = take(made.bytes + PADDING);
    return made;
}

static void resize(struct loaded *engine, size_t index, const int64_t *shape) {
    const struct spec *spec = &engine->base.inputs.items[index];
    int sizes[LITERT_RANK];
    bool same = true;
    for (size_t i = 0; i < spec->rank; i++) {
        if (shape[i] > INT32_MAX)
            fail(UNUSABLE, "input '%s' is too large", spec->name);
        sizes[i] = (int)shape[i];
        same = same && spec->shape[i].size == shape[i];
    }
    if (!same)
        check(api.CompiledModelResizeInputTensor(engine->compiled, 0, index, sizes, spec->rank),
              "ResizeInputTensor");
}

static struct binding *bind(struct engine *base, int64_t (*shapes)[MAX_RANK]) {
    struct loaded *engine = (struct loaded *)base;
    size_t ins = base->inputs.count, outs = base->outputs.count;
    struct binding *made = take(sizeof *made);
    struct buffers *buffers = made->values = take(sizeof *buffers);
    made->inputs = (struct arrays){ins, take_array(ins, sizeof(struct array))};
    made->outputs = (struct arrays){outs, take_array(outs, sizeof(struct array))};
    buffers->inputs = take_array(ins, sizeof(handle));
    buffers->outputs = take_array(outs, sizeof(handle));
    for (size_t i = 0; i < ins; i++) {
        resize(engine, i, shapes[i]);
        made->inputs.items[i] = padded(&base->inputs.items[i], shapes[i]);
        buffers->inputs[i] = buffer_over(&base->inputs.items[i], &made->inputs.items[i]);
    }
    struct layout *layouts = take_array(outs, sizeof *layouts);
    check(api.GetCompiledModelOutputTensorLayouts(engine->compiled, 0, outs, layouts, true),
          "GetCompiledModelOutputTensorLayouts");
    for (size_t i = 0; i < outs; i++) {
        const struct spec *spec = &base->outputs.items[i];
        int64_t shape[MAX_RANK];
        if (layouts[i].rank != spec->rank)
            fail(NO_TOOL, "the output '%s' has another rank than it says", spec->name);
        for (size_t d = 0; d < spec->rank; d++) {
            shape[d] = layouts[i].sizes[d];
            if (shape[d] < 1)
                fail(NO_TOOL, "the shape of the output '%s' depends on the data, which this runner "
                     "does not support with LiteRT", spec->name);
        }
        made->outputs.items[i] = padded(spec, shape);
        buffers->outputs[i] = buffer_over(spec, &made->outputs.items[i]);
    }
    return made;
}

static void run(struct engine *base, struct binding *binding) {
    struct loaded *engine = (struct loaded *)base;
    struct buffers *buffers = binding->values;
    check(api.RunCompiledModel(engine->compiled, 0, base->inputs.count, buffers->inputs,
                               base->outputs.count, buffers->outputs),
          "RunCompiledModel");
}

static void unbind(struct engine *base, struct binding *binding) {
    struct buffers *buffers = binding->values;
    for (size_t i = 0; i < base->inputs.count; i++)
        api.DestroyTensorBuffer(buffers->inputs[i]);
    for (size_t i = 0; i < base->outputs.count; i++)
        api.DestroyTensorBuffer(buffers->outputs[i]);
}

const struct engine_kind ENGINE_LITERT = {
    .name = "litert", .suffix = ".tflite", .load = load, .close = unload, .bind = bind,
    .run = run, .unbind = unbind};
