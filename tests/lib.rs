//! Tests that need root and a kernel; see CONTRIBUTING.md.
