#include "lib/greeting.h"

int main() { return greeting("test") == "hello, test (1.0)" ? 0 : 1; }
