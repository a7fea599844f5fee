#include "clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "memory.h"

static int64_t read_clock(clockid_t which) {
    struct timespec now;
    clock_gettime(which, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int64_t clock_ns(void) { return read_clock(CLOCK_MONOTONIC); }
int64_t clock_cpu_ns(void) { return read_clock(CLOCK_PROCESS_CPUTIME_ID); }

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

int64_t percentile_ns(const int64_t *samples, size_t count, double percent) {
    void *mark = memory_mark();
    int64_t *sorted = take_array(count, sizeof *sorted);
    memcpy(sorted, samples, count * sizeof *sorted);
    qsort(sorted, count, sizeof *sorted, by_size);
    double rank = ceil(percent * (double)count / 100);
    int64_t found = sorted[rank < 1 ? 0 : (size_t)rank - 1];
    memory_release(mark);
    return found;
}

static void percentile_to_json(struct text *text, const char *name, const int64_t *samples,
                               size_t count, double percent, size_t least) {
    if (count < least)
        text_json_member(text, name, NULL);
    else
        text_json_member_integer(text, name, percentile_ns(samples, count, percent));
}

// Fewer samples than 36 and 368 give no 95 % interval for p90 and p99.
void summary_to_json(struct text *text, const int64_t *samples, size_t count) {
    text_add(text, "{", 1);
    percentile_to_json(text, "p50", samples, count, 50, 1);
    percentile_to_json(text, "p90", samples, count, 90, 36);
    percentile_to_json(text, "p99", samples, count, 99, 368);
    percentile_to_json(text, "min", samples, count, 0, 1);
    text_json_member_integer(text, "samples", (int64_t)count);
    text_json_member(text, "label", "measured");
    text_add(text, "}", 1);
}

void samples_to_json(struct text *text, const int64_t *samples, size_t count) {
    text_add(text, "[", 1);
    for (size_t i = 0; i < count; i++)
        text_format(text, "%s%lld", i ? ", " : "", (long long)samples[i]);
    text_add(text, "]", 1);
}
