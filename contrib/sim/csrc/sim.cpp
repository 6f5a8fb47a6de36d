// All of the extension in one unit: PyTorch's headers take most of the time to compile, and are read once.

#include "allocator.cpp"
#include "autocast.cpp"
#include "generator.cpp"
#include "guard.cpp"
#include "host.cpp"
#include "module.cpp"
#include "operators.cpp"
#include "process_group.cpp"
