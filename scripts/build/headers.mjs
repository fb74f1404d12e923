// For node-gyp, which else downloads them: Node's headers from beside the Node that runs this, where they are.
import fs from 'node:fs'
import path from 'node:path'

/** The environment that says so. */
export function ownHeaders() {
  const prefix = path.resolve(fs.realpathSync(process.execPath), '..', '..')
  return fs.existsSync(path.join(prefix, 'include', 'node', 'common.gypi')) ? { npm_config_nodedir: prefix } : {}
}
