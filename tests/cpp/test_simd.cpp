// Checks simd.h for one instruction set and both dtypes; prints what fails and returns how much did.
#include "isa.h"
#include "simd.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>

using namespace fastmem::FASTMEM_ISA;

static int failures = 0;

static void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

template <class T> void check() {
  constexpr int lanes = kLanes<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  T in[lanes + 1], out[lanes + 1];

  for (int count = 0; count <= lanes; ++count) {
    for (int i = 0; i <= lanes; ++i) in[i] = T(i + 1), out[i] = T(-1);
    store_upto(out, load_upto(in, count), count);
    bool exact = true;
    for (int i = 0; i <= lanes; ++i) exact = exact && out[i] == (i < count ? in[i] : T(-1));
    expect(exact, "load_upto and store_upto touch the first lanes only");
    expect(sum<T>(load_upto(in, count)) == T(count * (count + 1) / 2), "lanes past the count read as zero");
  }

  Vec<T> rows[lanes];
  for (int i = 0; i < lanes; ++i)
    for (int lane = 0; lane < lanes; ++lane) rows[i][lane] = T(i * lanes + lane);
  const Vec<T> sums = sum_rows<T>(rows);
  for (int i = 0; i < lanes; ++i)
    expect(sums[i] == T(i * lanes * lanes + lanes * (lanes - 1) / 2), "sum_rows gives lane l the sum of row l");

  for (int i = 0; i < lanes; ++i)
    for (int lane = 0; lane < lanes; ++lane) rows[i][lane] = T(i * lanes + lane);
  transpose_square<T>(rows);
  for (int i = 0; i < lanes; ++i)
    for (int lane = 0; lane < lanes; ++lane)
      expect(rows[i][lane] == T(lane * lanes + i), "transpose_square exchanges rows and lanes");

  T worst = 0;
  for (T x = sizeof(T) == 4 ? T(-87) : T(-708); x <= T(80); x += T(0.37)) {
    const T exact = T(std::exp(double(x))), error = std::abs(exp<T>(broadcast(x))[0] - exact) / exact;
    worst = error > worst ? error : worst;
  }
  expect(worst <= 3 * std::numeric_limits<T>::epsilon(), "exp is within three roundings");
  expect(exp<T>(broadcast(T(0)))[0] == 1, "exp(0) = 1");
  expect(exp<T>(broadcast(-infinity))[0] == 0, "exp(-inf) = 0");
  expect(exp<T>(broadcast(T(-1000)))[0] == 0, "exp of the very small is 0");
  expect(std::isnan(exp<T>(broadcast(std::numeric_limits<T>::quiet_NaN()))[0]), "exp(NaN) = NaN");

  worst = 0;
  for (T x = T(1e-30); x < T(1e30); x *= T(1.07)) {
    const T exact = T(1 / (long double)x), error = std::abs(reciprocal<T>(broadcast(x))[0] - exact) / exact;
    worst = error > worst ? error : worst;
  }
  expect(worst <= std::numeric_limits<T>::epsilon(), "reciprocal is within two roundings");
  expect(reciprocal<T>(broadcast(T(1)))[0] == 1 && reciprocal<T>(broadcast(T(2)))[0] == T(0.5),
         "1 / 1 = 1, 1 / 2 = 0.5");
  expect(std::isnan(reciprocal<T>(broadcast(std::numeric_limits<T>::quiet_NaN()))[0]), "1 / NaN = NaN");

  worst = 0;
  for (T x = T(1e-30); x < T(1e30); x *= T(1.07)) {
    for (const T near : {x, 1 + x * T(1e-30), 1 - x * T(1e-31)}) {
      if (!(near > 0)) continue;
      const long double exact = std::log((long double)near);
      const T error = T(std::abs(log<T>(broadcast(near))[0] - exact) / (exact == 0 ? 1 : std::abs(exact)));
      worst = error > worst ? error : worst;
    }
  }
  expect(worst <= std::numeric_limits<T>::epsilon(), "log is within two roundings");
  expect(log<T>(broadcast(T(1)))[0] == 0, "log(1) = 0");
  expect(log<T>(broadcast(T(0)))[0] == -infinity, "log(0) = -inf");
  expect(log<T>(broadcast(infinity))[0] == infinity, "log(inf) = inf");
  expect(std::isnan(log<T>(broadcast(T(-1)))[0]), "log of a negative number is NaN");
  expect(std::isnan(log<T>(broadcast(std::numeric_limits<T>::quiet_NaN()))[0]), "log(NaN) = NaN");
}

int main() {
  check<float>();
  check<double>();
  return failures;
}
