#ifndef LIB_GREETING_H_
#define LIB_GREETING_H_

#include <string>

std::string greeting(const std::string& name);

#endif
