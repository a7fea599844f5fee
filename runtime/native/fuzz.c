// libFuzzer target: the first byte says what the rest is taken for.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "array.h"
#include "bundle.h"
#include "fail.h"
#include "memory.h"

static void read_bundle(const uint8_t *data, size_t size) {
    struct bundle *bundle = bundle_of(file_in_memory("bundle", data, size));
    bundle_verify(bundle);
    for (size_t i = 0; i < bundle->manifest->variants; i++) {
        size_t length;
        const struct variant *one = &bundle->manifest->variant[i];
        unsigned char *golden = bundle_read(bundle, one->golden_inputs, &length);
        struct file file = file_in_memory("golden", golden, length);
        npz_parse(&file);
    }
    same_interface(bundle->manifest, bundle->manifest);
}

static void read_one(const uint8_t *data, size_t size) {
    if (data[0] % 4 == 0)
        read_bundle(data + 1, size - 1);
    else if (data[0] % 4 == 1)
        manifest_parse((const char *)data + 1, size - 1);
    else if (data[0] % 4 == 2) {
        struct file file = file_in_memory("arrays", data + 1, size - 1);
        struct arrays found = npz_parse(&file);
        struct text text = {0};
        for (size_t i = 0; i < found.count && found.items[i].count < 4096; i++)
            array_to_json(&text, &found.items[i]);
    } else
        json_parse((const char *)data + 1, size - 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct trap trap;
    void *mark = memory_mark();
    memory_limit = (size_t)64 << 20;
    if (!size)
        return 0;
    trap_open(&trap);
    if (setjmp(trap.here))
        return 0; // refused: fine
    read_one(data, size);
    trap_close(&trap);
    memory_release(mark);
    return 0;
}
