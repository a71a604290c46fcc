// What the operators of attention share: checks, and views of q, k and v.
#pragma once
#include "../checks.h"
#include "memory.h"

namespace mtvit_ops {

// One of q, k and v: strides in elements, the last one 1.
struct View {
  const void* data;
  int64_t token, head;
};

// A last stride other than 1 costs a copy.
inline Tensor dense_last(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == 1 ? t : as_contiguous(t);
}

inline View view(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k) {
  check_dim("q", q, 3, "(Tq, H, d)");
  check_dim("k", k, 3, "(Tk, H, d)");
  check_dim("v", v, 3, "(Tk, H, dv)");
  MTVIT_CHECK(k.size(1) == q.size(1) && k.size(2) == q.size(2), "k must have shape (Tk, ", q.size(1), ", ", q.size(2),
              "), got ", shape_of(k));
  MTVIT_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1), "v must have shape (", k.size(0), ", ", k.size(1),
              ", dv), got ", shape_of(v));
  check_dtype("q", q);
  MTVIT_CHECK(same_dtype(k, q) && same_dtype(v, q), "q, k and v must have one dtype");
  MTVIT_CHECK(cu_q.size(0) == cu_k.size(0), "cu_seqlens_k must have shape (", cu_q.size(0), ",), got ", shape_of(cu_k));
}

inline void check_key_bias(const Tensor& bias, int64_t tokens, int64_t heads) {
  const bool fits = bias.dim() == 1 || (bias.dim() == 2 && bias.size(1) == heads);
  MTVIT_CHECK(fits && bias.size(0) == tokens, "key_bias must have shape (", tokens, ",) or (", tokens, ", ", heads,
              "), got ", shape_of(bias));
}

// Offsets against the tokens there are, and the bounds that the host gave.
inline void check_attention_offsets(const int32_t* cu_q, const int32_t* cu_k, int64_t batch, int64_t total_q,
                                    int64_t total_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const int64_t longest_q = check_cu_seqlens("cu_seqlens_q", cu_q, batch, total_q);
  const int64_t longest_k = check_cu_seqlens("cu_seqlens_k", cu_k, batch, total_k);
  MTVIT_CHECK_VALUE(max_seqlen_q >= longest_q, "max_seqlen_q must be at least ", longest_q, ", got ", max_seqlen_q);
  MTVIT_CHECK_VALUE(max_seqlen_k >= longest_k, "max_seqlen_k must be at least ", longest_k, ", got ", max_seqlen_k);
}

}  // namespace mtvit_ops
