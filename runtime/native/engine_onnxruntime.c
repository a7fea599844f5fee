#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <onnxruntime_c_api.h>

#include "engine_kind.h"
#include "fail.h"
#include "memory.h"

enum { MAX_PORTS = 4096 };

static const OrtApi *api;

struct loaded {
    struct engine base;
    OrtEnv *env;
    OrtSession *session;
    OrtMemoryInfo *memory;
    const char **input_names, **output_names;
};

struct values {
    OrtValue **inputs, **outputs;
    bool fixed; // outputs are written to our buffers
};

static char *taken_message(OrtStatus *status) {
    char text[512];
    one_line(text, sizeof text, api->GetErrorMessage(status));
    api->ReleaseStatus(status);
    return take_text(text, strlen(text));
}

static void check(OrtStatus *status) {
    if (status)
        fail(NO_TOOL, "the engine failed: %s", taken_message(status));
}

// A model of a later version than the engine knows, by what the engine says of it.
static bool too_new(const char *text) {
    static const char *const what[] = {"opset", "ir version", "ir_version", "domain_version"};
    static const char *const why[] = {"support", "guarantee", "max"};
    for (size_t i = 0; i < sizeof what / sizeof *what; i++)
        for (size_t j = 0; j < sizeof why / sizeof *why; j++) {
            const char *found = strcasestr(text, what[i]);
            if (found && strcasestr(found, why[j]))
                return true;
        }
    return false;
}

static void find_library(const char **version) {
    const char *name = getenv("EDGEKIT_ONNXRUNTIME");
    void *library = dlopen(name && *name ? name : "libonnxruntime.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        fail_next(NO_TOOL, "the engine 'onnxruntime' is not here: %s", dlerror());
    const OrtApiBase *(*base)(void);
    *(void **)&base = dlsym(library, "OrtGetApiBase");
    api = base ? base()->GetApi(ORT_API_VERSION) : NULL;
    if (!api)
        fail_next(NO_TOOL, "the engine 'onnxruntime' is too old: it has no API %d", ORT_API_VERSION);
    *version = base()->GetVersionString();
}

// An engine that is given bytes looks for weights in other files in the working folder.
static void refuse_external_data(const unsigned char *model, size_t size) {
    static const char key[] = "\x0a\x08location\x12"; // of TensorProto.external_data, field 13
    const unsigned char *end = model + size, *p = model;
    while ((p = memmem(p, (size_t)(end - p), key, sizeof key - 1))) {
        for (int back = 2; back <= 3; back++)
            if (p - model >= back && p[-back] == 0x6a)
                fail(UNUSABLE, "the ONNX model keeps weights in another file; save it as one file: "
                     "onnx.save(onnx.load(path), new_path)");
        p++;
    }
}

static enum dtype dtype_from(ONNXTensorElementDataType type) {
    static const enum dtype known[] = {
        [ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT] = FLOAT32, [ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8] = UINT8,
        [ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8] = INT8, [ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16] = UINT16,
        [ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16] = INT16, [ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32] = INT32,
        [ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64] = INT64, [ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL] = BOOL,
        [ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16] = FLOAT16,
        [ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE] = FLOAT64,
        [ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32] = UINT32,
        [ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64] = UINT64};
    return type < sizeof known / sizeof *known ? known[type] : NO_DTYPE;
}

static ONNXTensorElementDataType type_of(enum dtype dtype) {
    for (int i = 0; i <= ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64; i++)
        if (dtype_from((ONNXTensorElementDataType)i) == dtype)
            return (ONNXTensorElementDataType)i;
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

static void read_port(OrtTypeInfo *info, struct spec *spec) {
    const OrtTensorTypeAndShapeInfo *tensor = NULL;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check(api->CastTypeInfoToTensorInfo(info, &tensor));
    if (tensor)
        check(api->GetTensorElementType(tensor, &type));
    spec->dtype = dtype_name(dtype_from(type));
    if (!*spec->dtype)
        fail(NO_TOOL, "'%s' is no tensor of numbers; this runner knows only those", spec->name);
    check(api->GetDimensionsCount(tensor, &spec->rank));
    if (spec->rank > MAX_RANK)
        fail(UNUSABLE, "'%s' has %zu dimensions", spec->name, spec->rank);
    int64_t sizes[MAX_RANK];
    const char *names[MAX_RANK];
    check(api->GetDimensions(tensor, sizes, spec->rank));
    check(api->GetSymbolicDimensions(tensor, names, spec->rank));
    for (size_t i = 0; i < spec->rank; i++) {
        spec->shape[i].size = sizes[i] > 0 ? sizes[i] : 0;
        bool named = names[i] && *names[i] && strcmp(names[i], "?") && strcmp(names[i], "-1");
        spec->shape[i].name = named ? take_text(names[i], strlen(names[i]))
                                    : take_format("%s_%zu", spec->name, i);
    }
}

static struct specs read_ports(struct loaded *engine, bool inputs, const char ***names) {
    size_t count;
    OrtAllocator *allocator;
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    check((inputs ? api->SessionGetInputCount : api->SessionGetOutputCount)(engine->session, &count));
    if (count > MAX_PORTS)
        fail(UNUSABLE, "the model has %zu inputs or outputs", count);
    struct specs found = {count, take_array(count, sizeof(struct spec))};
    *names = take_array(count, sizeof(char *));
    for (size_t i = 0; i < count; i++) {
        char *name;
        OrtTypeInfo *info;
        check((inputs ? api->SessionGetInputName : api->SessionGetOutputName)(engine->session, i,
                                                                               allocator, &name));
        found.items[i].name = (*names)[i] = take_text(name, strlen(name));
        check(api->AllocatorFree(allocator, name));
        check((inputs ? api->SessionGetInputTypeInfo
                      : api->SessionGetOutputTypeInfo)(engine->session, i, &info));
        read_port(info, &found.items[i]);
        api->ReleaseTypeInfo(info);
    }
    return found;
}

static struct engine *load(const void *model, size_t size, int64_t threads) {
    struct loaded *engine = take(sizeof *engine);
    find_library(&engine->base.version);
    engine->base.delegate = "CPUExecutionProvider";
    refuse_external_data(model, size);
    OrtSessionOptions *options;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "edgekit", &engine->env));
    check(api->CreateSessionOptions(&options));
    check(api->SetIntraOpNumThreads(options, (int)threads));
    check(api->SetInterOpNumThreads(options, 1));
    check(api->SetSessionLogSeverityLevel(options, 4)); // its errors reach us as statuses
    OrtStatus *status =
        api->CreateSessionFromArray(engine->env, model, size, options, &engine->session);
    api->ReleaseSessionOptions(options);
    if (status) {
        char *why = taken_message(status);
        if (too_new(why))
            fail_next(NO_TOOL, "the model needs a newer onnxruntime than the %s here: %s",
                      engine->base.version, why);
        fail(UNUSABLE, "onnxruntime cannot load the model: %s", why);
    }
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &engine->memory));
    engine->base.inputs = read_ports(engine, true, &engine->input_names);
    engine->base.outputs = read_ports(engine, false, &engine->output_names);
    return &engine->base;
}

static void unload(struct engine *base) {
    struct loaded *engine = (struct loaded *)base;
    api->ReleaseMemoryInfo(engine->memory);
    api->ReleaseSession(engine->session);
    api->ReleaseEnv(engine->env);
}

static OrtValue *value_over(struct loaded *engine, struct array *array) {
    OrtValue *value;
    check(api->CreateTensorWithDataAsOrtValue(engine->memory, array->data, array->bytes, array->shape,
                                              array->rank, type_of(array->dtype), &value));
    return value;
}

// The outputs' shapes if the model's dimension names give them.
static bool output_shapes(struct loaded *engine, int64_t (*given)[MAX_RANK],
                          int64_t (*shapes)[MAX_RANK]) {
    for (size_t i = 0; i < engine->base.outputs.count; i++)
        for (size_t d = 0; d < engine->base.outputs.items[i].rank; d++) {
            const struct dimension *wanted = &engine->base.outputs.items[i].shape[d];
            int64_t size = wanted->size;
            for (size_t j = 0; j < engine->base.inputs.count && !size; j++)
                for (size_t e = 0; e < engine->base.inputs.items[j].rank; e++) {
                    const struct dimension *free_one = &engine->base.inputs.items[j].shape[e];
                    if (!free_one->size && !strcmp(free_one->name, wanted->name))
                        size = given[j][e];
                }
            if (!size)
                return false;
            shapes[i][d] = size;
        }
    return true;
}

static struct binding *bind(struct engine *base, int64_t (*shapes)[MAX_RANK]) {
    struct loaded *engine = (struct loaded *)base;
    struct binding *made = take(sizeof *made);
    struct values *values = made->values = take(sizeof *values);
    size_t ins = engine->base.inputs.count, outs = engine->base.outputs.count;
    made->inputs = (struct arrays){ins, take_array(ins, sizeof(struct array))};
    made->outputs = (struct arrays){outs, take_array(outs, sizeof(struct array))};
    values->inputs = take_array(ins, sizeof(OrtValue *));
    values->outputs = take_array(outs, sizeof(OrtValue *));
    for (size_t i = 0; i < ins; i++) {
        const struct spec *spec = &engine->base.inputs.items[i];
        made->inputs.items[i] = array_make(spec->name, dtype_of(spec->dtype), spec->rank, shapes[i]);
        values->inputs[i] = value_over(engine, &made->inputs.items[i]);
    }
    int64_t(*known)[MAX_RANK] = take_array(outs, sizeof *known);
    values->fixed = output_shapes(engine, shapes, known);
    for (size_t i = 0; i < outs; i++) {
        const struct spec *spec = &engine->base.outputs.items[i];
        enum dtype dtype = dtype_of(spec->dtype);
        made->outputs.items[i] = (struct array){.name = spec->name, .dtype = dtype};
        if (!values->fixed)
            continue;
        made->outputs.items[i] = array_make(spec->name, dtype, spec->rank, known[i]);
        values->outputs[i] = value_over(engine, &made->outputs.items[i]);
    }
    return made;
}

static void release_outputs(struct loaded *engine, struct values *values) {
    for (size_t i = 0; i < engine->base.outputs.count; i++)
        if (values->outputs[i]) {
            api->ReleaseValue(values->outputs[i]);
            values->outputs[i] = NULL;
        }
}

// What the engine allocated, as arrays over its memory.
static void look_at_outputs(struct loaded *engine, struct binding *binding) {
    struct values *values = binding->values;
    for (size_t i = 0; i < engine->base.outputs.count; i++) {
        struct array *array = &binding->outputs.items[i];
        OrtTensorTypeAndShapeInfo *info;
        check(api->GetTensorTypeAndShape(values->outputs[i], &info));
        check(api->GetDimensionsCount(info, &array->rank));
        if (array->rank > MAX_RANK)
            fail(NO_TOOL, "the output '%s' has %zu dimensions", array->name, array->rank);
        check(api->GetDimensions(info, array->shape, array->rank));
        check(api->GetTensorShapeElementCount(info, &array->count));
        api->ReleaseTensorTypeAndShapeInfo(info);
        array->bytes = array->count * dtype_size(array->dtype);
        check(api->GetTensorMutableData(values->outputs[i], &array->data));
    }
}

static OrtStatus *invoke(struct loaded *engine, struct values *values) {
    return api->Run(engine->session, NULL, engine->input_names,
                    (const OrtValue *const *)values->inputs, engine->base.inputs.count,
                    engine->output_names, engine->base.outputs.count, values->outputs);
}

static void run(struct engine *base, struct binding *binding) {
    struct loaded *engine = (struct loaded *)base;
    struct values *values = binding->values;
    if (!values->fixed)
        release_outputs(engine, values);
    OrtStatus *status = invoke(engine, values);
    if (status && values->fixed && strcasestr(api->GetErrorMessage(status), "shape")) {
        api->ReleaseStatus(status); // the outputs' shapes depend on the data
        release_outputs(engine, values);
        values->fixed = false;
        status = invoke(engine, values);
    }
    check(status);
    if (!values->fixed)
        look_at_outputs(engine, binding);
}

static void unbind(struct engine *base, struct binding *binding) {
    struct loaded *engine = (struct loaded *)base;
    struct values *values = binding->values;
    for (size_t i = 0; i < engine->base.inputs.count; i++)
        api->ReleaseValue(values->inputs[i]);
    release_outputs(engine, values);
}

const struct engine_kind ENGINE_ONNXRUNTIME = {
    .name = "onnxruntime", .suffix = ".onnx", .load = load, .close = unload, .bind = bind,
    .run = run, .unbind = unbind};
