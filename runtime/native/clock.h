// Latency samples, and what is said of them: `edgekit_runtime.timing`.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "text.h"

int64_t clock_ns(void);     // monotonic
int64_t clock_cpu_ns(void); // of this process
// The smallest sample that at least `percent` % of all do not exceed.
int64_t percentile_ns(const int64_t *samples, size_t count, double percent);
// {"p50", "p90", "p99", "min", "samples", "label"}
void summary_to_json(struct text *text, const int64_t *samples, size_t count);
void samples_to_json(struct text *text, const int64_t *samples, size_t count);
