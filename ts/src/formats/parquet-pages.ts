/**
 * What hyparquet takes on trust: it reads on for ever where a page has a negative length, and nobody waits for a column that the
 * schema has not, so that its failure ends the process.
 */
import type { AsyncBuffer, ColumnMetaData, FileMetaData, RowGroup, SchemaTree } from 'hyparquet'
import { mismatch, show } from '../util/errors.js'

// Larger than any page that a writer makes.
const MAX_PAGE = 2 ** 30

/** Columns of a row group against the schema and the number of rows. @throws AlignGPTError ERR_DATA */
function checkColumns(file: string, group: RowGroup, schema: SchemaTree): ColumnMetaData[] {
  const seen = new Set<string>()
  return group.columns.map(({ meta_data }) => {
    const path = meta_data?.path_in_schema ?? []
    const name = path.join('.')
    const column = schema.children.find((c) => c.element.name === path[0])
    const isFlat = column?.children.length === 0
    if (!meta_data || !column || seen.has(name) || (isFlat && path.length > 1))
      throw mismatch('ERR_DATA', 'parquet', file, 'columns that its schema has, each once', show(name))
    seen.add(name)
    const [rows, values] = [group.num_rows, meta_data.num_values]
    if (rows < 0 || values < rows || (isFlat && values !== rows))
      throw mismatch('ERR_DATA', 'parquet', `${file}: column ${name}`, `the values of ${rows} rows`, `${values}`)
    return meta_data
  })
}

/**
 * Walks over the headers of all pages of a row group.
 * @throws AlignGPTError ERR_DATA where a size or number cannot be
 */
export async function checkRowGroup(
  file: string,
  source: AsyncBuffer,
  group: RowGroup,
  of: FileMetaData,
): Promise<void> {
  const [{ parquetHeader }, { parquetSchema }] = await Promise.all([
    import('hyparquet/src/column.js'),
    import('hyparquet/src/metadata.js'),
  ])
  for (const meta of checkColumns(file, group, parquetSchema(of))) {
    const where = `${file}: column ${meta.path_in_schema.join('.')}`
    const startByte = Number(meta.dictionary_page_offset || meta.data_page_offset)
    const endByte = startByte + Number(meta.total_compressed_size)
    if (!(startByte >= 0 && endByte >= startByte && endByte <= source.byteLength))
      throw mismatch('ERR_DATA', 'parquet', where, `bytes within ${source.byteLength}`, `${startByte} to ${endByte}`)
    const reader = { view: new DataView(await source.slice(startByte, endByte)), offset: 0 }
    for (let values = 0; reader.offset < reader.view.byteLength - 1; ) {
      const page = parquetHeader(reader)
      const left = reader.view.byteLength - reader.offset
      const [size, full] = [page.compressed_page_size, page.uncompressed_page_size]
      if (!(size >= 0 && size <= left && full >= 0 && full <= MAX_PAGE))
        throw mismatch('ERR_DATA', 'parquet', where, `a page within ${left} bytes`, `one of ${size}, unpacked ${full}`)
      reader.offset += size
      const { num_values: n = 0 } = page.data_page_header ?? page.data_page_header_v2 ?? {}
      values += n
      const words = page.dictionary_page_header?.num_values ?? 0
      if (!(n >= 0 && values <= meta.num_values && words >= 0 && words <= 8 * full))
        throw mismatch('ERR_DATA', 'parquet', where, `a page within ${meta.num_values} values`, `${n || words}`)
    }
  }
}
