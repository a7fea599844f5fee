// ONNX Runtime's C API, as plainly as it goes: one session, tensors made once, `Run` in a loop.
//
//     native_overhead LIBRARY MODEL THREADS; then each line "COUNT UNTIMED" on its standard input
//     is answered by a line of COUNT latencies in nanoseconds
//
// The counterpart of `edgekit-run worker`, for native_overhead.py. Free dimensions are 1.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { MOST = 16, RANK = 8 };
static const OrtApi *api;

static void check(OrtStatus *status) {
    if (!status)
        return;
    fprintf(stderr, "%s\n", api->GetErrorMessage(status));
    exit(3);
}

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static OrtValue *tensor(OrtAllocator *allocator, OrtTypeInfo *info) {
    const OrtTensorTypeAndShapeInfo *facts;
    ONNXTensorElementDataType type;
    OrtValue *made;
    size_t rank;
    int64_t shape[RANK];
    check(api->CastTypeInfoToTensorInfo(info, &facts));
    check(api->GetTensorElementType(facts, &type));
    check(api->GetDimensionsCount(facts, &rank));
    if (rank > RANK)
        exit(2);
    check(api->GetDimensions(facts, shape, rank));
    for (size_t i = 0; i < rank; i++)
        shape[i] = shape[i] > 0 ? shape[i] : 1;
    check(api->CreateTensorAsOrtValue(allocator, shape, rank, type, &made));
    size_t count = 1;
    float *values;
    check(api->GetTensorMutableData(made, (void **)&values));
    for (size_t i = 0; i < rank; i++)
        count *= (size_t)shape[i];
    for (size_t i = 0; i < count; i++)
        if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
            values[i] = (float)(i % 97) / 97;
        else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32)
            ((int *)values)[i] = 1;
        else
            exit(2);
    return made;
}

int main(int count, char **words) {
    if (count != 4)
        return 2;
    void *library = dlopen(words[1], RTLD_NOW);
    const OrtApiBase *(*base)(void);
    if (!library)
        return 3;
    *(void **)&base = dlsym(library, "OrtGetApiBase");
    api = base()->GetApi(ORT_API_VERSION);
    OrtEnv *env;
    OrtSessionOptions *options;
    OrtSession *session;
    OrtAllocator *allocator;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "plain", &env));
    check(api->CreateSessionOptions(&options));
    check(api->SetIntraOpNumThreads(options, atoi(words[3])));
    check(api->SetInterOpNumThreads(options, 1));
    check(api->CreateSession(env, words[2], options, &session));
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    size_t ins, outs;
    char *in_names[MOST], *out_names[MOST];
    OrtValue *in[MOST], *out[MOST];
    OrtTypeInfo *info;
    check(api->SessionGetInputCount(session, &ins));
    check(api->SessionGetOutputCount(session, &outs));
    if (ins > MOST || outs > MOST)
        return 2;
    for (size_t i = 0; i < ins; i++) {
        check(api->SessionGetInputName(session, i, allocator, &in_names[i]));
        check(api->SessionGetInputTypeInfo(session, i, &info));
        in[i] = tensor(allocator, info);
    }
    for (size_t i = 0; i < outs; i++) {
        check(api->SessionGetOutputName(session, i, allocator, &out_names[i]));
        check(api->SessionGetOutputTypeInfo(session, i, &info));
        out[i] = tensor(allocator, info);
    }
    long samples, untimed;
    while (scanf("%ld %ld", &samples, &untimed) == 2) {
        long long *taken = calloc((size_t)samples + 1, sizeof *taken);
        for (long i = -untimed; i < samples; i++) {
            long long start = now_ns();
            check(api->Run(session, NULL, (const char *const *)in_names, (const OrtValue *const *)in,
                           ins, (const char *const *)out_names, outs, out));
            if (i >= 0)
                taken[i] = now_ns() - start;
        }
        for (long i = 0; i < samples; i++)
            printf("%s%lld", i ? " " : "", taken[i]);
        printf("\n");
        fflush(stdout);
        free(taken);
    }
    return 0;
}
