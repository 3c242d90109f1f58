// What follows from the constants of a launch (`shapes.Shape`) and the sides K and V (`source.side`).
#pragma once
#include "planes.cuh"

constexpr int MINE = HEADS / 4;        // query rows of a lane: lane % 4 and, of eight, 4 more
constexpr int TOKENS = 8;              // of a lane, neighbours: two of each of four operands C
constexpr int UNITS = D / 64;
constexpr int SUMS = V::TRELLIS ? UNITS * HEADS / 2 : D / 16;  // operands C of a warp's output
constexpr int USED = V::TRELLIS ? 2 : MINE;                    // columns of them that a lane needs: of its rows
constexpr int ROWS = D / 8;            // channels of a lane, neighbours
constexpr float LIMIT = 65536.f;       // sum of exponentials at which the reference point moves
constexpr float TINY = 1e-35f;
constexpr float QUERY_STEPS = 254.f;   // low steps in a high one
constexpr int WARPS = THREADS / 32;
constexpr int SLOT_BYTES = PIECES == 1 ? K::BYTES + V::BYTES : K::BYTES > V::BYTES ? K::BYTES : V::BYTES;
constexpr bool LOG8_SCALES = K::SCALE.kind == LOG8 || V::SCALE.kind == LOG8;
constexpr bool BY_PAGE = K::CHANNEL_SCALE.kind != NONE || (K::CHANNEL_ZERO.kind != NONE && K::CHANNEL_ZERO.kind != INT8);
constexpr bool MEAN = !BY_PAGE && K::CHANNEL_ZERO.kind == INT8;
constexpr bool K_ZERO = K::ZERO.kind != NONE || K::MID != 0;
constexpr bool V_ZERO = V::ZERO.kind != NONE || V::MID != V::CENTRE;
constexpr bool V_CHANNELS = V::CHANNEL_SCALE.kind != NONE || V::CHANNEL_ZERO.kind != NONE;
