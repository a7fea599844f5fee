// What the machine says of itself and of this process; -1 or NAN where it says nothing.
#pragma once
#include <stdint.h>

#include "text.h"

const char *machine_name(void); // as Linux calls it: `x86_64`, `aarch64`
// As the kernel has it, Arm's by number: `implementer 0x41 part 0xd08`; NULL where it says nothing.
const char *machine_cpu_name(void);
int64_t machine_rss_bytes(void);
int64_t machine_peak_rss_bytes(void);
int64_t machine_free_memory_bytes(void);

struct reading {
    int64_t wall_ns, cpu_ns, rss_bytes;
    double temperature_c, frequency_mhz;
};

struct reading machine_read(void);
// "cpu_ns", "wall_ns", "energy_j", "rss_bytes", "temperature_c", "frequency_mhz"
void machine_to_json(struct text *text, const struct reading *before, const struct reading *after);
// {"rss", "anonymous", "file", "pss", "peak"}
void machine_memory_to_json(struct text *text);
