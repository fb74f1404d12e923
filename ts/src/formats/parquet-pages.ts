/**
 * What hyparquet takes on trust: it reads on for ever where a page has a negative length, and nobody waits for a column that the
 * schema has not, so that its failure ends the process.
 */
import type { AsyncBuffer, ColumnMetaData, FileMetaData, PageHeader, RowGroup, SchemaTree } from 'hyparquet'
import { type AlignGPTError, mismatch, show } from '../util/errors.js'

// Larger than any page that a writer makes.
const MAX_PAGE = 2 ** 30

const unreadable = (file: string, got: string): AlignGPTError =>
  mismatch('ERR_DATA', 'parquet', file, 'a Parquet file that can be read', got)

/** Columns of a row group against the schema and the number of rows. @throws AlignGPTError ERR_DATA */
function checkColumns(file: string, group: RowGroup, schema: SchemaTree): ColumnMetaData[] {
  const seen = new Set<string>()
  return group.columns.map(({ meta_data }) => {
    const path = meta_data?.path_in_schema ?? []
    const name = path.join('.')
    const column = schema.children.find((c) => c.element.name === path[0])
    const isFlat = column?.children.length === 0
    if (!meta_data || !column || seen.has(name) || (isFlat && path.length > 1))
      throw unreadable(file, `a column ${show(name)} that its schema has not, or has once`)
    seen.add(name)
    const [rows, values] = [group.num_rows, meta_data.num_values]
    if (rows < 0 || values < rows || (isFlat && values !== rows))
      throw unreadable(file, `${values} values of column ${name} in ${rows} rows`)
    return meta_data
  })
}

const within = (n: unknown, most: number): boolean => Number.isInteger(n) && (n as number) >= 0 && (n as number) <= most

/** How many values of the column a page has; not a number: its header says what cannot be. */
function valuesOf(page: PageHeader, size: number): number {
  const { data_page_header: one, data_page_header_v2: two, dictionary_page_header: words } = page
  if (page.type === 'DATA_PAGE') return one?.num_values ?? Number.NaN
  if (page.type === 'DICTIONARY_PAGE')
    return within(words?.num_values, 8 * page.uncompressed_page_size) ? 0 : Number.NaN
  if (page.type !== 'DATA_PAGE_V2' || !two) return Number.NaN
  const levels = two.definition_levels_byte_length + two.repetition_levels_byte_length
  const fits = within(two.definition_levels_byte_length, size) && within(levels, size)
  return fits && within(two.num_nulls, two.num_values) && within(two.num_rows, two.num_values)
    ? two.num_values
    : Number.NaN
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
    const name = meta.path_in_schema.join('.')
    const start = Number(meta.dictionary_page_offset || meta.data_page_offset)
    const end = start + Number(meta.total_compressed_size)
    if (!(start >= 0 && end >= start && end <= source.byteLength))
      throw unreadable(file, `column ${name} from byte ${start} to ${end} of ${source.byteLength}`)
    const reader = { view: new DataView(await source.slice(start, end)), offset: 0 }
    for (let values = 0; reader.offset < reader.view.byteLength - 1; ) {
      const page = parquetHeader(reader)
      const left = reader.view.byteLength - reader.offset
      const [size, full] = [page.compressed_page_size, page.uncompressed_page_size]
      if (!(size >= 0 && size <= left && full >= 0 && full <= MAX_PAGE))
        throw unreadable(file, `a page of ${size} bytes, unpacked ${full}, in the last ${left} of column ${name}`)
      reader.offset += size
      const n = valuesOf(page, size)
      values += n
      if (!(n >= 0 && values <= meta.num_values)) throw unreadable(file, `a page of ${n} values in column ${name}`)
    }
  }
}
