// Memory that is freed in the reverse order it was taken: nobody frees single blocks.
#pragma once
#include <stddef.h>

// Zeroed, aligned for any type and for SIMD (64 bytes). Fails with UNUSABLE over `memory_limit`.
void *take(size_t size);
void *take_array(size_t count, size_t size);
char *take_text(const char *bytes, size_t length);
char *take_format(const char *format, ...) __attribute__((format(printf, 1, 2)));

void *memory_mark(void);
void memory_release(void *mark);

extern size_t memory_limit; // bytes in all
