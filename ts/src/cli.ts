#!/usr/bin/env node
import { main } from './cli/main.js'

const status = await main()
if (status !== undefined) process.exitCode = status
