// A software bill of materials (CycloneDX) of the published package -> sbom.cdx.json: what npm knows of its
// dependencies, and what is linked into the binaries of prebuilds/linux-x64, which npm does not know.
import { execFileSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..', '..')
const folder = path.join(root, 'prebuilds', 'linux-x64')
const output = (command, ...args) => execFileSync(command, args, { cwd: root, encoding: 'utf8', maxBuffer: 1 << 26 })
const json = (name) => JSON.parse(fs.readFileSync(path.join(root, name), 'utf8'))

/** The compiler wrote its version into the binary; libstdc++ has the same. */
function compiler(file) {
  const version = /GCC: \(.*\) (\S+)/.exec(output('readelf', '-p', '.comment', path.join(folder, file)))?.[1]
  if (!version) throw new Error(`[sbom] ${file}: expected a GCC in .comment`)
  return version
}

const linked = [
  { name: 'libstdc++', version: compiler('aligngpt.glibc.node'), license: 'GPL-3.0-or-later WITH GCC-exception-3.1' },
]
if (fs.existsSync(path.join(folder, 'libaligngpt_cuda.so'))) {
  const version = /release [\d.]+, V(\S+)/.exec(output('nvcc', '--version'))?.[1]
  linked.push({ name: 'cuda-runtime', version, license: 'LicenseRef-NVIDIA-CUDA-EULA' })
}

const sbom = JSON.parse(output('npm', 'sbom', '--sbom-format', 'cyclonedx', '--omit', 'dev', '--package-lock-only'))
sbom.metadata.component.name = json('package.json').name // npm takes the folder's
for (const { name, version, license } of linked) {
  const ref = `${name}@${version}`
  sbom.components.push({
    'bom-ref': ref,
    type: 'library',
    name,
    version,
    scope: 'required',
    licenses: [{ expression: license }],
  })
}
fs.writeFileSync(path.join(root, 'sbom.cdx.json'), `${JSON.stringify(sbom, null, 2)}\n`)
console.log(
  `sbom.cdx.json: ${sbom.components.length} components, linked in: ${linked.map((l) => `${l.name} ${l.version}`).join(', ')}`,
)
