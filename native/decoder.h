// The two halves of a decoder layer around its attention, for a few tokens. In fp32, rounded once at the end of each.
#pragma once
#include "linear.h"

namespace tersekv {

struct DecoderLayer {
  Kind kind;  // of everything
  // `input` and `post` (hidden), `q_norm` and `k_norm` (d) or null: weights of norms by the root of the mean square.
  const uint8_t *input, *post, *q_norm, *k_norm;
  Linear q, k, v, o, gate, up, down;
  float eps;
  int d;  // of a head, even

  int hidden() const { return q.in; }
  int heads() const { return (q.out + k.out + v.out) / d; }  // of queries, keys and values
};

// What goes into attention: y (vectors, heads, d) = queries, keys and values of x (vectors, hidden). Queries and keys
// are turned by `cos` and `sin` (vectors, d), channel i with channel i + d / 2.
void project(const DecoderLayer& layer, const uint8_t* x, const uint8_t* cos, const uint8_t* sin, int vectors,
             uint8_t* y, const Processor& on);

// What comes after it, from what was attended to (vectors, query heads, d), and the layer's input x: its output.
void finish(const DecoderLayer& layer, const uint8_t* attended, const uint8_t* x, int vectors, uint8_t* y,
            const Processor& on);

}  // namespace tersekv
