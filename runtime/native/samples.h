// Inputs from files: `.npy`, `.npz`, or bytes.
#pragma once
#include "session.h"

// One sample from files given as `[NAME=]FILE`; `tensors`: without the bundle's preprocessing.
struct arrays sample_from(const struct session *session, char **files, size_t count, bool tensors);
// Each sample of an `.npz` in turn, as `edgekit optimize --data` takes it, or noise without a file.
struct arrays *samples_from(const struct session *session, const char *path, bool raw, size_t *count);
