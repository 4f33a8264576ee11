#!/bin/sh
# Runs one of Mbed TLS's test suites: run_suite.sh BINARY TABLE. Its cases name their files relative to tests/.
cd tests && exec "../$1" "../$2"
