// Ends the section that begin_target.h began. GCC keeps the instructions to the
// end of the file, so nothing may follow.
#if defined(__clang__)
#pragma clang attribute pop
#endif
