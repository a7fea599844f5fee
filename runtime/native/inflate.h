// Raw DEFLATE (RFC 1951), from one block of memory to another.
#pragma once
#include <stdbool.h>
#include <stddef.h>

// Whether `from` is one whole stream, no byte more, of exactly `size` bytes.
bool inflate(const unsigned char *from, size_t length, unsigned char *to, size_t size);
