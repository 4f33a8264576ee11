#!/bin/sh
echo "the failing test says why"
exit 1
