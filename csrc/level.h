// A kernel at one instruction level.
#pragma once

namespace selfreward {

template <typename Run>
struct Level {
  const char* name;  // "" past the last level
  Run run;
};

}  // namespace selfreward
