#include "geglu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "instruction_set.h"

namespace difffast {
namespace {

#define DIFFFAST_KERNELS "geglu_kernel.h"
#include "every_set.h"

template <class S>
void run_rows(const Geglu& p, int64_t begin, int64_t end) {
  DIFFFAST_BY_SET(rows<S>(p, begin, end))
}

}  // namespace

void geglu_rows(const Geglu& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Scalar::kFloat32: return run_rows<float>(p, begin, end);
    case Scalar::kFloat64: return run_rows<double>(p, begin, end);
    case Scalar::kBFloat16: return run_rows<BFloat16>(p, begin, end);
  }
}

}  // namespace difffast
