// The steps a bundle declares before and after its model, as far as a phone needs them.
#pragma once
#include "session.h"

// One sample's input from a file or array, through the bundle's steps; `raw` is an array, or the
// bytes of a file as uint8 (n,). Fails with UNUSABLE, or with NO_TOOL for a step that is not here.
struct array preprocess(const struct session *session, const char *input, struct array raw);
bool has_preprocess(const struct session *session, const char *input);
// The answer as members of a JSON object: the outputs, and what the steps made of them.
void postprocess(const struct session *session, const struct arrays *outputs, struct text *answer);
