#!/bin/sh
echo "before the long sleep"
sleep 8642
