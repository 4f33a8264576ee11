#include "lib/greeting.h"

#include "lib/version.h"

std::string greeting(const std::string& name) {
  return "hello, " + name + " (" DEMO_VERSION ")";
}
