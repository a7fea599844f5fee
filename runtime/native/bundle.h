// Bundles: a canonical ZIP whose every byte is accounted for before an engine sees any.
#pragma once
#include "file.h"
#include "manifest.h"

struct bundle {
    const char *path;
    struct file file;
    size_t entries;
    struct entry *entry;
    struct manifest *manifest;
    const char *manifest_text;
    size_t manifest_size;
};

// Fails with UNUSABLE: not a bundle, damaged, hostile, or of another schema version.
struct bundle *bundle_open(const char *path);
struct bundle *bundle_of(struct file file);
void bundle_close(struct bundle *bundle);
// The bytes of one file, compared with its hash.
unsigned char *bundle_read(struct bundle *bundle, const char *path, size_t *size);
// Hash every file.
void bundle_verify(struct bundle *bundle);
// Whether the file is named or begins like a bundle; says nothing about its health.
bool is_bundle(const char *path);
